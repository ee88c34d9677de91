"""Networks of namespaces to try crablb in: the demo, the tests and the benchmarks all live in them.

``bridge``: one segment. ::

    client 10.0.0.1    lb 10.0.0.2    server1 10.0.0.11    server2 10.0.0.12 ...
          |                 |                |                    |
          +-----------------+---- switch ----+--------------------+

``routed``: three subnets behind a router. ::

    client 10.1.0.1 ---+            +--- server1 10.3.0.11
                       +-- router --+--- server2 10.3.0.12 ...
    lb     10.2.0.2 ---+

IPv6 likewise: fd00::/64 on the segment; fd00:1::/64, fd00:2::/64 and fd00:3::/64 behind the router.  The VIPs,
10.0.0.100 and fd00::100, are reached by a route through the load balancer; servers have them on their loopback, which
the fallback needs.
"""

from crablb.lab.lab import VIP4, VIP6, Lab, Node, existing, mine

__all__ = ["VIP4", "VIP6", "Lab", "Node", "existing", "mine"]
