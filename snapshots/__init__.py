"""Signed, content-addressed snapshots: manifest, store, verification, sealed memory."""
