"""Selection, schedule, step engines, the drop-in for diffusers pipelines, and the CLI `cat-generate`."""
