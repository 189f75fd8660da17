"""The study: `scales` (where things are), `results` (tables, figures, provenance), `runner` (the notebooks,
headlessly)."""
