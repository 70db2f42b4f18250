"""Ray itself: a run's session, a Ray of our own or one that is joined, its token, and waiting for room."""
