"""``crablb doctor``: what a machine, its network, or a load balancer on it has that keeps packets from their way.

Each finding is a function of what was read, plain values: :mod:`.machine`, :mod:`.interfaces`, :mod:`.vips`,
:mod:`.backends`, :mod:`.filters`, :mod:`.daemon`.  :mod:`.examine` reads and judges all of it at once, bounded in time.
Nothing is changed.
"""
