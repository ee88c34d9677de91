"""What is said between a running load balancer and those who ask it: types, and a client."""
