"""Training of the bundles that ship with the package. Needs the extra `train`."""
