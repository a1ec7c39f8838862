"""Studies: plans of the evaluation engine that reproduce papers and compare defences."""
