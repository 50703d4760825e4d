"""Load tests: what is asked, how often, by whom, and whether the server held."""
