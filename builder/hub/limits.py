"""What the Hub takes, and what follows from it for a build that is sent there piece by piece."""

import re

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
MAX_FILE_BYTES = 20 * 10**9
MAX_FILES = 10_000
"""Of a folder."""
FILES_PER_COMMIT = 50
"""The Hub asks for fewer than 100."""
COMMITS_PER_HOUR = 128
"""What the Hub allows before it answers 429."""
MAX_LOCAL_SHARDS = 4
"""On the disk of a build that discards what has arrived: one is computed, one sent, and two wait for their commit."""
DISCARDED_TOGETHER = 2
