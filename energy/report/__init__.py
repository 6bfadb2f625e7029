"""Reports: one self-contained page, CSV and JSON of an energy profile or of the ledger of a run."""
