"""Plumbing shared by the scripts. `common` imports no script; a method to be checked against an equation stands in its script."""
