"""From a model on disk to a signed snapshot: importers, quantisation, guest initialisation."""
