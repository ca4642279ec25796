"""Training: the loop, and what it is made of: groups, terms of the loss, engines, run-keeping, plans.
May import every room but study."""
