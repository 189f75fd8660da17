"""The study: `scales` (where things are), `queue` (its training runs and measurements), `measured` (what they gave, by
sample), `tables` (the paper's tables and the verdicts on its claims), `results` (files and their provenance), `runner`
(the notebooks, headlessly)."""
