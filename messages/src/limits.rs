//! Every limit of protocol and formats. A decoder compares with these before it allocates.

/// Longest tenant or repository name, bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest text for people in a message (reasons, host labels, software versions), bytes.
pub const TEXT_BYTES_MAX: usize = 4096;
/// Longest tag of a snapshot, bytes.
pub const TAG_BYTES_MAX: usize = 256;
/// Most tags of a snapshot.
pub const TAGS_MAX: usize = 64;
/// Longest file name, bytes (Linux `NAME_MAX`).
pub const FILE_NAME_BYTES_MAX: usize = 255;
/// Longest symbolic link target, bytes (Linux `PATH_MAX`).
pub const LINK_TARGET_BYTES_MAX: usize = 4096;
/// Longest extended attribute name, bytes (Linux `XATTR_NAME_MAX`).
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// Longest extended attribute value, bytes (Linux `XATTR_SIZE_MAX`).
pub const XATTR_VALUE_BYTES_MAX: usize = 65_536;
/// Most extended attributes of one file.
pub const XATTRS_MAX: usize = 1024;

/// Longest body of a control frame, bytes.
pub const CONTROL_BYTES_MAX: usize = 1 << 20;
/// Longest body of a frame before both sides have greeted, and in an enrolment, bytes: nobody is known yet.
pub const GREETING_BYTES_MAX: usize = 64 << 10;
/// Longest encrypted body of a block, bytes.
pub const BLOCK_BODY_BYTES_MAX: usize = 4 << 20;
/// Longest chunk table of a block, bytes.
pub const BLOCK_TABLE_BYTES_MAX: usize = 1 << 20;
/// Longest wrapped data key in a block header, bytes (room for a hybrid post-quantum KEM).
pub const WRAPPED_KEY_BYTES_MAX: usize = 4096;
/// Most chunks in one block.
pub const BLOCK_CHUNKS_MAX: usize = 8192;
/// Longest block in all, bytes: fixed header, wrapped key, table, body, digest.
pub const BLOCK_BYTES_MAX: usize = crate::format::block::FIXED_HEADER_BYTES
    + WRAPPED_KEY_BYTES_MAX
    + BLOCK_TABLE_BYTES_MAX
    + BLOCK_BODY_BYTES_MAX
    + 32;
/// Longest frame on a data stream, bytes: a block with its sequence number.
pub const DATA_FRAME_BYTES_MAX: usize = BLOCK_BYTES_MAX + 16;

/// Longest chunk, bytes: half the block limit.
pub const CHUNK_BYTES_MAX: usize = BLOCK_BODY_BYTES_MAX / 2;
/// Most references of one tree chunk.
pub const TREE_REFERENCES_MAX: usize = 8192;
/// Most entries of one tree chunk.
pub const TREE_ENTRIES_MAX: usize = 8192;
/// Deepest list of lists: a file's references or a directory's entries.
pub const LIST_DEPTH_MAX: u8 = 8;
/// Longest file content that may stand in its tree entry, bytes.
pub const INLINE_BYTES_MAX: usize = 4096;

/// Longest snapshot manifest, bytes.
pub const MANIFEST_BYTES_MAX: usize = 64 << 10;
/// Longest key slot, bytes.
pub const KEY_SLOT_BYTES_MAX: usize = 16 << 10;
/// Most key slots of a repository.
pub const KEY_SLOTS_MAX: usize = 1024;
/// Most bytes of all key slots of a repository: one message holds them.
pub const KEY_SLOTS_BYTES_MAX: usize = 896 << 10;
/// Most slots on which a passphrase is tried: each may ask for as much memory and time as the limits below allow.
pub const PASSPHRASE_SLOTS_MAX: usize = 64;
/// Most memory a passphrase slot may ask for, KiB (1 GiB).
pub const ARGON2_MEMORY_KIB_MAX: u32 = 1 << 20;
/// Most passes a passphrase slot may ask for.
pub const ARGON2_PASSES_MAX: u32 = 16;
/// Most lanes a passphrase slot may ask for.
pub const ARGON2_LANES_MAX: u32 = 64;

/// Length at which a pack is sealed, bytes.
pub const PACK_BYTES_MAX: u64 = 512 << 20;
/// Most blocks of one pack (its footer stays small).
pub const PACK_BLOCKS_MAX: usize = 1 << 20;

/// Most ids in one query.
pub const QUERY_IDS_MAX: usize = 8192;
/// Most query ids that may wait for an answer in one session: the credit of `QueryChunks`.
pub const QUERY_IDS_OUTSTANDING_MAX: usize = 4 * QUERY_IDS_MAX;
/// Most ids in one fetch of a restore session.
pub const FETCH_IDS_MAX: usize = 8192;
/// Most fetches of a restore session that may be under way.
pub const FETCHES_OUTSTANDING_MAX: usize = 8;
/// Most ids in one `Missing` page.
pub const MISSING_IDS_MAX: usize = 4096;
/// Most ranges in one acknowledgement, attachment or retransmission.
pub const RANGES_MAX: usize = 4096;
/// Most data addresses of a session.
pub const DATA_ADDRESSES_MAX: usize = 16;
/// Longest network address as text, bytes.
pub const ADDRESS_BYTES_MAX: usize = 300;
/// Most streams of one session.
pub const STREAMS_MAX: u16 = 64;
/// Most sequence numbers above the watermark that a receiver accepts.
pub const SEQUENCE_WINDOW: u64 = 4096;
/// Most snapshots in one page of a listing.
pub const LIST_PAGE_MAX: usize = 256;
/// Most repositories, and most sessions, in one status report.
pub const STATUS_ROWS_MAX: usize = 1024;
/// Longest certificate or certificate request, bytes.
pub const CERTIFICATE_BYTES_MAX: usize = 16 << 10;
/// Longest enrolment secret, bytes.
pub const TOKEN_BYTES_MAX: usize = 512;
/// Most snapshots in one operation.
pub const MANAGED_SNAPSHOTS_MAX: usize = 1024;
/// Most blocks in one operation.
pub const MANAGED_BLOCKS_MAX: usize = 8192;
/// Most partly dead blocks in one answer.
pub const PARTLY_DEAD_MAX: usize = 256;
/// Most damaged blocks, and most affected snapshots, that a report names.
pub const DAMAGE_ROWS_MAX: usize = 1024;
