"""The dataplane: what the workers and the XDP program see, and how it changes.

:mod:`.engine` owns the parts and calls them; each part owns its state, is tested alone, and never calls back up.
"""
