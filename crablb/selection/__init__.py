"""Selection: which backend a connection is redirected to, and what is known of the backends' loads."""
