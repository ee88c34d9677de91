"""crablb: a layer-4 load balancer that takes itself out of the way by connection redirection."""
