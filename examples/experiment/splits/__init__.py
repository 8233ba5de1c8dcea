"""How many exact entries and how many draws: its page is README.md, its plan and claims are in frontier.py."""
