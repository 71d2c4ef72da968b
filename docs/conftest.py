"""Pages are doctested; what builds the site, and its copies of the notebooks, are not tests."""

collect_ignore_glob = ["conf.py", "_ext/*", "notebooks/*"]
