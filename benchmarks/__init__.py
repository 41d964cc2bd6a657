"""Side-by-side measurements against the peers. Nothing of the product imports from here."""
