//! The opener: a block in, its verified chunks out.
//!
//! Order of checks: form and limits, repository, unwrapping, commitment, tag, decompression bound, chunk lengths, and at
//! each access the chunk's id. No buffer is read after a failed check. The tag covers what the digest covers; the digest is
//! compared only to tell damage from everything else when a check has failed.

use std::any::Any;
use std::collections::VecDeque;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use aws_lc_rs::aead::Aad;
use parking_lot::Mutex;
use strandline_actors::runtime::buffer::BlockBuffer;
use strandline_messages::format::block::{BlockView, ChunkRow, Codec, PLAINTEXT_BYTES_MAX, TAG_BYTES};
use strandline_messages::format::chunk::{REFERENCE_BYTES, Reference};
use strandline_messages::{BlockDigest, ChunkId, ChunkKind};
use zstd::bulk::Decompressor;

use super::OpenError;
use super::data_key::{BLOCK, DataKey, zero_nonce};
use crate::keys::Keyset;

/// Unwrapped data keys kept: one per session whose blocks are being read; unwrapping costs about 0.1 ms.
const DATA_KEYS_MAX: usize = 64;
/// Idle decompression contexts kept: one per thread that opens blocks.
const DECOMPRESSORS_MAX: usize = 16;

/// Opens blocks of one repository. Shared by threads; clones share the caches.
#[derive(Clone)]
pub struct Opener {
    shared: Arc<Shared>,
}

struct Shared {
    keyset: Keyset,
    /// Most recently used last; at most [`DATA_KEYS_MAX`].
    data_keys: Mutex<VecDeque<DataKey>>,
    decompressors: Mutex<Vec<Decompressor<'static>>>,
}

impl Opener {
    /// For the blocks of the keyset's repository. The keyset needs the read capability.
    pub fn new(keyset: &Keyset) -> Self {
        let shared = Shared {
            keyset: keyset.clone(),
            data_keys: Mutex::new(VecDeque::new()),
            decompressors: Mutex::new(Vec::new()),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Opens a block. Chunk ids are checked when chunks are taken out of it.
    pub fn open(&self, block: &[u8]) -> Result<OpenedBlock, OpenError> {
        let view = BlockView::parse(block)?;
        self.open_view(&view).map_err(|error| match view.verify_digest() {
            Ok(_) => error,
            Err(damaged) => damaged.into(),
        })
    }

    fn open_view(&self, view: &BlockView<'_>) -> Result<OpenedBlock, OpenError> {
        let keyset = &self.shared.keyset;
        let (digest, header) = (view.stored_digest(), view.header);
        if header.repository != keyset.repository() {
            let (expected, found) = (keyset.repository(), header.repository);
            return Err(OpenError::ForeignRepository { what: "block", expected, found });
        }
        let derived = self.data_key(header.wrap_algorithm, view.wrapped_key())?.derive(BLOCK, &header.salt);
        if !derived.commits_to(&header.commitment) {
            return Err(OpenError::Commitment { what: "block" });
        }
        let cipher = derived.cipher().ok_or(OpenError::Unwrap { what: "block" })?;
        let wrong_tag = || OpenError::Tag { what: "block" };
        let (ciphertext, tag) = view.body().split_last_chunk::<TAG_BYTES>().ok_or_else(wrong_tag)?;
        let mut body = BlockBuffer::with_len(ciphertext.len());
        cipher
            .open_separate_gather(zero_nonce(), Aad::from(view.aad()), ciphertext, tag, &mut body)
            .map_err(|_| wrong_tag())?;
        let plaintext = match header.codec {
            Codec::Stored => body,
            Codec::Zstd => self.decompress(&body, digest)?,
        };
        let mut rows = Vec::with_capacity(header.chunks as usize);
        for row in view.rows() {
            rows.push(row?);
        }
        let ranges = chunk_ranges(&plaintext, rows.len())?;
        let shared = Arc::clone(&self.shared);
        Ok(OpenedBlock { shared, kind: header.kind, digest, rows, plaintext, ranges, lease: None })
    }

    fn data_key(&self, algorithm: u8, wrapped: &[u8]) -> Result<DataKey, OpenError> {
        let mut kept = self.shared.data_keys.lock();
        if let Some(place) = kept.iter().position(|key| key.wrapped() == wrapped)
            && let Some(key) = kept.remove(place)
        {
            kept.push_back(key.clone());
            return Ok(key);
        }
        drop(kept);
        let key = DataKey::unwrap(&self.shared.keyset, algorithm, wrapped, "block")?;
        let mut kept = self.shared.data_keys.lock();
        if kept.len() >= DATA_KEYS_MAX {
            kept.pop_front();
        }
        kept.push_back(key.clone());
        Ok(key)
    }

    /// Never allocates more than the limit, whatever the frame says or does.
    fn decompress(&self, body: &[u8], block: BlockDigest) -> Result<BlockBuffer, OpenError> {
        let refused = || OpenError::Decompress { block, max: PLAINTEXT_BYTES_MAX };
        let stated = zstd::zstd_safe::get_frame_content_size(body).map_err(|_| refused())?;
        let capacity = match stated.map(usize::try_from) {
            None => PLAINTEXT_BYTES_MAX,
            Some(Ok(bytes)) if bytes <= PLAINTEXT_BYTES_MAX => bytes,
            Some(_) => return Err(refused()),
        };
        let kept = self.shared.decompressors.lock().pop();
        let mut decompressor = match kept {
            Some(decompressor) => decompressor,
            None => Decompressor::new().map_err(|_| refused())?,
        };
        let mut plaintext = BlockBuffer::with_len(capacity);
        let written = decompressor.decompress_to_buffer(body, &mut *plaintext).map_err(|_| refused())?;
        plaintext.truncate(written);
        let plaintext = plaintext.fitted();
        let mut kept = self.shared.decompressors.lock();
        if kept.len() < DECOMPRESSORS_MAX {
            kept.push(decompressor);
        }
        Ok(plaintext)
    }
}

/// Splits the codec's input into chunks: the lengths at its beginning must add up to the rest exactly.
fn chunk_ranges(plaintext: &[u8], chunks: usize) -> Result<Vec<Range<usize>>, OpenError> {
    let contradiction = || OpenError::invalid("block", "the lengths of its chunks are not the length of its body");
    let (lengths, content) = plaintext.split_at_checked(chunks * 4).ok_or_else(contradiction)?;
    let mut ranges = Vec::with_capacity(chunks);
    let mut start = lengths.len();
    for length in lengths.as_chunks::<4>().0 {
        let end = start.checked_add(u32::from_le_bytes(*length) as usize).ok_or_else(contradiction)?;
        ranges.push(start..end);
        start = end;
    }
    if start == lengths.len() + content.len() { Ok(ranges) } else { Err(contradiction()) }
}

/// A block's decrypted chunks.
pub struct OpenedBlock {
    shared: Arc<Shared>,
    kind: ChunkKind,
    digest: BlockDigest,
    rows: Vec<ChunkRow>,
    plaintext: BlockBuffer,
    ranges: Vec<Range<usize>>,
    lease: Option<Box<dyn Any + Send + Sync>>,
}

/// One chunk whose content, kind and references are those that its id names.
#[derive(Clone, Copy, Debug)]
pub struct OpenedChunk<'a> {
    /// The chunk.
    pub id: ChunkId,
    /// Its plaintext.
    pub bytes: &'a [u8],
    /// What it refers to (always empty for data chunks).
    pub references: &'a [Reference],
}

impl std::fmt::Debug for OpenedBlock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "OpenedBlock({}, {} chunks)", self.digest, self.rows.len())
    }
}

impl OpenedBlock {
    /// Keeps `lease` until the block is dropped: whoever delivered the block learns so that it has been used.
    pub fn keep(&mut self, lease: Box<dyn Any + Send + Sync>) {
        self.lease = Some(lease);
    }

    /// Data or tree.
    pub fn kind(&self) -> ChunkKind {
        self.kind
    }

    /// The block's name in messages for people.
    pub fn digest(&self) -> BlockDigest {
        self.digest
    }

    /// The chunk table: ids (not yet verified) and references, in the order of the chunks.
    pub fn rows(&self) -> &[ChunkRow] {
        &self.rows
    }

    /// Bytes of memory that the block takes, about.
    pub fn memory_bytes(&self) -> usize {
        let references: usize = self.rows.iter().map(|row| row.references.len()).sum();
        self.plaintext.memory_bytes() + self.rows.len() * 96 + references * REFERENCE_BYTES
    }

    /// The chunk in row `index`, verified against its id. An index without a row is [`OpenError::Format`].
    pub fn chunk(&self, index: usize) -> Result<OpenedChunk<'_>, OpenError> {
        let missing = || OpenError::invalid("block", "it has no such chunk");
        let row = self.rows.get(index).ok_or_else(missing)?;
        let range = self.ranges.get(index).ok_or_else(missing)?;
        let bytes = self.plaintext.get(range.clone()).ok_or_else(missing)?;
        if self.shared.keyset.chunk_id(self.kind, bytes, &row.references) != row.id {
            return Err(OpenError::WrongChunk { block: self.digest, chunk: row.id });
        }
        Ok(OpenedChunk { id: row.id, bytes, references: &row.references })
    }

    /// The bytes of neighbouring chunks as one piece, not verified by this call.
    pub fn span(&self, chunks: RangeInclusive<usize>) -> &[u8] {
        let start = self.ranges.get(*chunks.start()).map_or(0, |range| range.start);
        let end = self.ranges.get(*chunks.end()).map_or(0, |range| range.end);
        self.plaintext.get(start..end).unwrap_or_default()
    }

    /// All chunks in order, each verified against its id.
    pub fn chunks(&self) -> impl Iterator<Item = Result<OpenedChunk<'_>, OpenError>> {
        (0..self.rows.len()).map(|index| self.chunk(index))
    }

    /// Verifies every id; the first that is wrong is the error.
    pub fn verify_ids(&self) -> Result<(), OpenError> {
        self.chunks().try_for_each(|chunk| chunk.map(drop))
    }
}

#[cfg(test)]
mod tests {
    use strandline_messages::RepositoryId;
    use strandline_messages::format::FormatError;
    use strandline_messages::format::block::{BlockHeaderV1, FIXED_HEADER_BYTES};
    use strandline_messages::format::keys::Capability;

    use super::*;
    use crate::seal::{Body, Sealer};

    struct Fixture {
        keyset: Keyset,
        sealer: Sealer,
    }

    impl Fixture {
        fn new() -> Self {
            let keyset = Keyset::create(RepositoryId([1; 16])).unwrap();
            let sealer = Sealer::new(&keyset, 3).unwrap();
            Self { keyset, sealer }
        }

        fn row(&self, kind: ChunkKind, bytes: &[u8], references: &[Reference]) -> ChunkRow {
            ChunkRow { id: self.keyset.chunk_id(kind, bytes, references), references: references.to_vec() }
        }

        fn seal(&mut self, kind: ChunkKind, rows: &[ChunkRow], chunks: &[&[u8]]) -> Vec<u8> {
            let mut body = Body::default();
            for chunk in chunks {
                body.push(chunk);
            }
            self.sealer.seal(kind, rows, &mut body).unwrap().bytes.to_vec()
        }

        fn tree_block(&mut self) -> Vec<u8> {
            let references = [Reference::data(ChunkId([5; 32])), Reference::tree(ChunkId([6; 32]))];
            let rows = [self.row(ChunkKind::Tree, b"first", &references), self.row(ChunkKind::Tree, b"", &[])];
            self.seal(ChunkKind::Tree, &rows, &[b"first", b""])
        }

        fn opener(&self) -> Opener {
            Opener::new(&self.keyset)
        }
    }

    /// Repairs the digest after a change that it would find.
    fn redigest(block: &mut [u8]) {
        let covered = block.len() - 32;
        let digest = blake3::hash(&block[..covered]);
        block[covered..].copy_from_slice(digest.as_bytes());
    }

    #[test]
    fn a_sealed_block_opens_to_its_chunks() {
        let mut f = Fixture::new();
        let text = b"compressible ".repeat(9000);
        for chunks in [vec![&b"one"[..], b"", b"three"], vec![&text[..], b"x"]] {
            let rows: Vec<_> = chunks.iter().map(|bytes| f.row(ChunkKind::Data, bytes, &[])).collect();
            let block = f.seal(ChunkKind::Data, &rows, &chunks);
            let opened = f.opener().open(&block).unwrap();
            let found: Vec<_> = opened.chunks().map(|chunk| chunk.unwrap().bytes).collect();
            assert_eq!(found, chunks);
            opened.verify_ids().unwrap();
            assert!(opened.chunk(chunks.len()).is_err());
        }
        let block = f.tree_block();
        let opened = f.opener().open(&block).unwrap();
        assert_eq!(opened.chunk(0).unwrap().references.len(), 2);
        assert!(opened.memory_bytes() > 66);
    }

    #[test]
    fn every_flipped_byte_fails_even_under_a_matching_digest() {
        let mut f = Fixture::new();
        let good = f.tree_block();
        let opener = f.opener();
        opener.open(&good).unwrap();
        for place in 0..good.len() {
            let mut bad = good.clone();
            bad[place] ^= 0x20;
            if place >= good.len() - 32 {
                // Nothing rests on the digest itself; the server, which has no key, compares it.
                opener.open(&bad).unwrap().verify_ids().unwrap();
                continue;
            }
            assert!(matches!(opener.open(&bad), Err(OpenError::Format(_))), "byte {place}");
            redigest(&mut bad);
            assert!(opener.open(&bad).is_err(), "byte {place} under a new digest");
        }
    }

    #[test]
    fn s48_a_block_of_another_repository_is_refused() {
        let mut f = Fixture::new();
        let mut block = f.tree_block();
        block[28] ^= 1;
        redigest(&mut block);
        assert!(matches!(f.opener().open(&block), Err(OpenError::ForeignRepository { what: "block", .. })));
        let stranger = Opener::new(&Keyset::create(RepositoryId([1; 16])).unwrap());
        assert!(matches!(stranger.open(&f.tree_block()), Err(OpenError::Unwrap { .. })));
    }

    #[test]
    fn s48_a_chunk_swapped_for_another_is_detected_by_its_id() {
        let mut f = Fixture::new();
        let rows = [f.row(ChunkKind::Data, b"mine", &[]), f.row(ChunkKind::Data, b"evil", &[])];
        let block = f.seal(ChunkKind::Data, &rows, &[b"evil", b"evil"]);
        let opened = f.opener().open(&block).unwrap();
        let wrong = OpenError::WrongChunk { block: opened.digest(), chunk: rows[0].id };
        assert_eq!(opened.chunk(0).unwrap_err(), wrong);
        assert_eq!(opened.verify_ids().unwrap_err(), wrong);
        assert_eq!(opened.chunk(1).unwrap().bytes, b"evil");
    }

    #[test]
    fn s48_forged_references_are_detected_by_the_id() {
        let mut f = Fixture::new();
        let honest = f.row(ChunkKind::Tree, b"node", &[Reference::data(ChunkId([5; 32]))]);
        let forged = ChunkRow { references: vec![Reference::data(ChunkId([6; 32]))], ..honest.clone() };
        let emptied = ChunkRow { references: vec![], ..honest };
        for row in [forged, emptied] {
            let block = f.seal(ChunkKind::Tree, &[row], &[b"node"]);
            assert!(matches!(f.opener().open(&block).unwrap().verify_ids(), Err(OpenError::WrongChunk { .. })));
        }
    }

    /// A block as a malicious writer with a valid data key would make it: any bytes as the codec's output.
    fn forge(f: &Fixture, codec: Codec, body: &[u8]) -> Vec<u8> {
        let data_key = f.sealer.data_key();
        let row = f.row(ChunkKind::Data, b"", &[]);
        let mut header = BlockHeaderV1 {
            kind: ChunkKind::Data,
            codec,
            wrap_algorithm: 1,
            wrapped_key_bytes: 80,
            chunks: 1,
            table_bytes: 32,
            body_bytes: u32::try_from(body.len() + 16).unwrap(),
            repository: f.keyset.repository(),
            salt: [9; 32],
            commitment: [0; 32],
        };
        let derived = data_key.derive(BLOCK, &header.salt);
        header.commitment = derived.commitment;
        let mut out = Vec::new();
        header.encode(&mut out);
        out.extend_from_slice(data_key.wrapped());
        out.extend_from_slice(row.id.as_bytes());
        let mut sealed = body.to_vec();
        derived.cipher().unwrap().seal_in_place_append_tag(zero_nonce(), Aad::from(&out), &mut sealed).unwrap();
        out.extend_from_slice(&sealed);
        out.extend_from_slice(&[0; 32]);
        redigest(&mut out);
        out
    }

    #[test]
    fn s43_a_decompression_bomb_is_refused_before_it_is_unpacked() {
        let f = Fixture::new();
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        let error = f.opener().open(&forge(&f, Codec::Zstd, &bomb)).unwrap_err();
        assert!(matches!(error, OpenError::Decompress { max: PLAINTEXT_BYTES_MAX, .. }), "{error}");
        // The same without a stated size: decoding stops at the limit.
        let silent = zstd::stream::encode_all(&vec![0; 64 << 20][..], 1).unwrap();
        assert!(zstd::zstd_safe::get_frame_content_size(&silent).unwrap().is_none());
        assert!(matches!(f.opener().open(&forge(&f, Codec::Zstd, &silent)), Err(OpenError::Decompress { .. })));
        let frames = zstd::bulk::compress(&[0; 10], 1).unwrap().repeat(3);
        assert!(f.opener().open(&forge(&f, Codec::Zstd, &frames)).is_err());
    }

    #[test]
    fn s43_lengths_that_do_not_add_up_are_refused() {
        let f = Fixture::new();
        f.opener().open(&forge(&f, Codec::Stored, &[0; 4])).unwrap().verify_ids().unwrap();
        for body in [&[][..], &[0; 3], &[1, 0, 0, 0], &[0, 0, 0, 0, 0], &[255; 4]] {
            let error = f.opener().open(&forge(&f, Codec::Stored, body)).unwrap_err();
            assert!(matches!(error, OpenError::Format(FormatError::Invalid { .. })), "{error}");
        }
        assert!(f.opener().open(&forge(&f, Codec::Zstd, &[1, 2, 3])).is_err());
    }

    #[test]
    fn a_changed_salt_is_found_by_the_commitment() {
        let mut f = Fixture::new();
        for place in [44, 76, FIXED_HEADER_BYTES - 1] {
            let mut block = f.tree_block();
            block[place] ^= 1;
            redigest(&mut block);
            assert_eq!(f.opener().open(&block).unwrap_err(), OpenError::Commitment { what: "block" });
        }
    }

    #[test]
    fn a_write_only_key_cannot_open_what_it_sealed() {
        let full = Keyset::create(RepositoryId([1; 16])).unwrap();
        let writer = full.narrowed(Capability::Write).unwrap();
        let mut f = Fixture { sealer: Sealer::new(&writer, 3).unwrap(), keyset: writer };
        let block = f.tree_block();
        assert_eq!(f.opener().open(&block).unwrap_err(), OpenError::NoReadCapability);
        Opener::new(&full).open(&block).unwrap();
        Opener::new(&full.narrowed(Capability::Read).unwrap()).open(&block).unwrap();
    }

    #[test]
    fn the_cache_of_data_keys_is_bounded() {
        let mut f = Fixture::new();
        let opener = f.opener();
        let first = f.tree_block();
        for _ in 0..DATA_KEYS_MAX + 3 {
            f.sealer = Sealer::new(&f.keyset, 3).unwrap();
            opener.open(&f.tree_block()).unwrap();
        }
        assert_eq!(opener.shared.data_keys.lock().len(), DATA_KEYS_MAX);
        opener.open(&first).unwrap();
    }
}
