-- Tenants, the machines enrolled in them, and the tokens that let a machine enrol.
-- Everything but tokens and last_seen_ns is also in storage/identities.journal. Times are ns since 1970.

CREATE TABLE tenants (
    name       TEXT    NOT NULL PRIMARY KEY,
    created_ns INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- A token is stored as the BLAKE3-256 of its secret. It is good once, until it expires.
CREATE TABLE tokens (
    hash       BLOB    NOT NULL PRIMARY KEY CHECK (length(hash) = 32),
    tenant     TEXT    NOT NULL REFERENCES tenants (name),
    created_ns INTEGER NOT NULL,
    expires_ns INTEGER NOT NULL,
    used_ns    INTEGER,
    used_by    BLOB CHECK (length(used_by) = 16)
) STRICT, WITHOUT ROWID;

-- An agent is enrolled until it is revoked; a revocation is never taken back.
CREATE TABLE agents (
    id           BLOB    NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    tenant       TEXT    NOT NULL REFERENCES tenants (name),
    label        TEXT    NOT NULL,
    key_hash     BLOB    NOT NULL CHECK (length(key_hash) = 32),
    enrolled_ns  INTEGER NOT NULL,
    expires_ns   INTEGER NOT NULL,
    last_seen_ns INTEGER,
    revoked_ns   INTEGER
) STRICT, WITHOUT ROWID;

CREATE INDEX agents_by_tenant ON agents (tenant);
