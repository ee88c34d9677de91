"""What the hot loop computes, again: in plain Python, from the protocol's description, without a look at the C.

Slow on purpose.  The differential tests compare the two.
"""
