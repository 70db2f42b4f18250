"""May this URL be fetched, how politely, and by which bytes.

`policy.py` judges a URL and every redirect, `resolver.py` finds the one address that is connected to, `robots.py` reads what
a site forbids, `rate_limiter.py` keeps requests to a host apart, `connection.py` does the fetching.
"""
