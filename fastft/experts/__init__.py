"""Mixture-of-experts layers.

experts  recogniser: stock's implementation is kept, and the report says so
"""
