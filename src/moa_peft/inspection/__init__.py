"""What routers and experts do on given texts: statistics of one streaming pass, as an HTML page, JSON and figures.

May import: evaluation, training, data, mixture.
"""
