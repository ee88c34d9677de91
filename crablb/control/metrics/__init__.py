"""What a load balancer shows to whoever looks: metrics for Prometheus, and a status page.  It changes nothing."""
