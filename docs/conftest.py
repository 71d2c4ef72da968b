"""Pages are doctested; the site's configuration and its copies of the notebooks are not tests."""

collect_ignore_glob = ["conf.py", "notebooks/*"]
