-- The storage engine's tables. Files are the truth for repositories, snapshots and packs; the rest lives here only.

CREATE TABLE repositories (
    number     INTEGER PRIMARY KEY,
    tenant     TEXT    NOT NULL,
    id         BLOB    NOT NULL,
    name       TEXT    NOT NULL,
    file       BLOB    NOT NULL,
    -- Current epoch; a lease carries the one at which it was taken, a condemned block the one at which it was condemned.
    epoch      INTEGER NOT NULL DEFAULT 1,
    -- The newest fence given to a lease.
    fence      INTEGER NOT NULL DEFAULT 0,
    -- Counts condemnations and withdrawals; a commit asserts that it did not move since its check.
    published  INTEGER NOT NULL DEFAULT 0,
    UNIQUE (tenant, id),
    UNIQUE (tenant, name)
) STRICT;

CREATE TABLE snapshots (
    repository   INTEGER NOT NULL REFERENCES repositories (number),
    id           BLOB    NOT NULL,
    place        INTEGER NOT NULL,
    committed_ns INTEGER NOT NULL,
    agent        BLOB    NOT NULL,
    domain       BLOB    NOT NULL,
    job          TEXT    NOT NULL,
    host         TEXT    NOT NULL,
    manifest     BLOB    NOT NULL,
    receipt      BLOB    NOT NULL,
    PRIMARY KEY (repository, id),
    UNIQUE (repository, place)
) STRICT, WITHOUT ROWID;

CREATE TABLE sessions (
    id            BLOB    PRIMARY KEY,
    repository    INTEGER NOT NULL REFERENCES repositories (number),
    tenant        TEXT    NOT NULL,
    agent         BLOB    NOT NULL,
    domain        BLOB    NOT NULL,
    state         TEXT    NOT NULL CHECK (state IN ('open', 'committed', 'finished', 'failed', 'aborted', 'expired')),
    reason        TEXT    NOT NULL DEFAULT '',
    superseded_by BLOB,
    opened_ns     INTEGER NOT NULL,
    ended_ns      INTEGER,
    receipt       BLOB,
    CHECK ((state = 'open') = (ended_ns IS NULL)),
    CHECK ((state = 'committed') = (receipt IS NOT NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX sessions_by_repository ON sessions (repository, opened_ns);
CREATE INDEX sessions_open ON sessions (repository) WHERE state = 'open';

CREATE TABLE leases (
    session    BLOB    PRIMARY KEY REFERENCES sessions (id),
    repository INTEGER NOT NULL REFERENCES repositories (number),
    epoch      INTEGER NOT NULL,
    fence      INTEGER NOT NULL,
    ended      INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX leases_held ON leases (repository) WHERE ended = 0;

-- What the last start or close knew of each pack, so that a start need not open all of them.
CREATE TABLE packs (
    repository INTEGER NOT NULL REFERENCES repositories (number),
    number     INTEGER NOT NULL,
    domain     BLOB    NOT NULL,
    state      TEXT    NOT NULL CHECK (state IN ('open', 'sealed')),
    file_bytes INTEGER NOT NULL,
    blocks_end INTEGER NOT NULL,
    blocks     INTEGER NOT NULL,
    PRIMARY KEY (repository, number)
) STRICT, WITHOUT ROWID;

-- Exceptions only: a block without a row is live.
CREATE TABLE block_states (
    repository   INTEGER NOT NULL REFERENCES repositories (number),
    pack         INTEGER NOT NULL,
    block_offset INTEGER NOT NULL,
    state        TEXT    NOT NULL CHECK (state IN ('condemned', 'freeing', 'freed', 'withdrawn')),
    epoch        INTEGER NOT NULL,
    PRIMARY KEY (repository, pack, block_offset)
) STRICT, WITHOUT ROWID;
