"""`roclip dashboard`: a read-only, live page of one run, from its files alone."""
