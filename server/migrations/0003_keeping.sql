-- What becomes of snapshots and blocks after their commit. Settings, tags, protection, deletions and purges are also in the
-- repository's keeping.journal, freed and withdrawn blocks in the state files of packs.

-- How the repository keeps its snapshots, as JSON.
ALTER TABLE repositories ADD COLUMN settings TEXT NOT NULL DEFAULT '{}';
-- Counts commits and undeletions: a condemnation asserts that it did not move since its mark.
ALTER TABLE repositories ADD COLUMN commits INTEGER NOT NULL DEFAULT 0;
-- The newest place given to a snapshot; none is given twice.
ALTER TABLE repositories ADD COLUMN last_place INTEGER NOT NULL DEFAULT 0;
UPDATE repositories SET last_place = coalesce((SELECT max(place) FROM snapshots WHERE repository = number), 0);

-- Tags that replace the manifest's, signed.
ALTER TABLE snapshots ADD COLUMN tags BLOB;
ALTER TABLE snapshots ADD COLUMN protected INTEGER NOT NULL DEFAULT 0;
-- A deleted snapshot keeps its row until it is purged.
ALTER TABLE snapshots ADD COLUMN deleted_ns INTEGER;
ALTER TABLE snapshots ADD COLUMN final_ns INTEGER;
ALTER TABLE snapshots ADD COLUMN deleted_by BLOB;
ALTER TABLE snapshots ADD COLUMN deleted_why TEXT;

-- Snapshots that are gone for good.
CREATE TABLE purged (
    repository INTEGER NOT NULL REFERENCES repositories (number),
    id         BLOB    NOT NULL,
    purged_ns  INTEGER NOT NULL,
    PRIMARY KEY (repository, id)
) STRICT, WITHOUT ROWID;

-- Parts of packs that hold blocks of sessions that ended without a snapshot: kept for a while, so that a backup that was
-- killed does not begin again.
CREATE TABLE uncommitted (
    repository INTEGER NOT NULL REFERENCES repositories (number),
    pack       INTEGER NOT NULL,
    start      INTEGER NOT NULL,
    finish     INTEGER NOT NULL,
    until_ns   INTEGER NOT NULL,
    PRIMARY KEY (repository, pack, start, finish)
) STRICT, WITHOUT ROWID;

-- How far each pack was verified: blocks before done_offset at this_ns, the others at last_ns (0: never).
CREATE TABLE verified (
    repository  INTEGER NOT NULL REFERENCES repositories (number),
    pack        INTEGER NOT NULL,
    done_offset INTEGER NOT NULL,
    this_ns     INTEGER NOT NULL,
    last_ns     INTEGER NOT NULL,
    PRIMARY KEY (repository, pack)
) STRICT, WITHOUT ROWID;

-- When each kind of maintenance last came to its end, and what it said.
CREATE TABLE maintenance (
    repository  INTEGER NOT NULL REFERENCES repositories (number),
    job         TEXT    NOT NULL,
    finished_ns INTEGER NOT NULL,
    failed      INTEGER NOT NULL,
    report      TEXT    NOT NULL,
    PRIMARY KEY (repository, job)
) STRICT, WITHOUT ROWID;
