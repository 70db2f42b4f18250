"""HTTP fetching under a policy: whether a URL may be requested, at what rate, and how its body is read.

`policy.py` checks a URL and every redirect, `resolver.py` looks up its addresses, `robots.py` applies robots.txt,
`rate_limiter.py` limits connections and requests per host, and `connection.py` makes the request.
"""
