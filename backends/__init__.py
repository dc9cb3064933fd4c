"""The backends that come with pmcore. Each is found by name through the entry-point group `pmcore.backends`."""
