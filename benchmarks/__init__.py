"""Measurements against what a user would otherwise pick. They print ratios: times alone depend on the machine."""
