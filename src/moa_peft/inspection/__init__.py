"""What the routers and the experts of a model do on given texts, in one streaming pass."""
