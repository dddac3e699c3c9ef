//! What somebody with a good data key may have sealed: any bytes as a codec's output.

use std::sync::LazyLock;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use hpke::aead::AesGcm256;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeS, Serializable, single_shot_seal};
use strandline_agent::keys::Keyset;
use strandline_agent::seal::Opener;
use strandline_messages::format::block::{
    BlockHeaderV1, Codec, DIGEST_BYTES, FIXED_HEADER_BYTES, PLAINTEXT_BYTES_MAX, TAG_BYTES, encode_row,
};
use strandline_messages::{ChunkId, ChunkKind, RepositoryId, limits};

use super::memory::within;

/// A repository, and one data key of it, all by docs/FORMAT.md and without the agent's own sealing.
struct Forge {
    keyset: Keyset,
    opener: Opener,
    wrapped: Vec<u8>,
    commitment: [u8; 32],
    cipher: LessSafeKey,
}

const SALT: [u8; 32] = [9; 32];

static FORGE: LazyLock<Forge> = LazyLock::new(|| Forge::new().unwrap_or_else(|why| panic!("{why}")));

impl Forge {
    fn new() -> Result<Self, String> {
        let (repository, key) = (RepositoryId([7; 16]), [5u8; 32]);
        let keyset = Keyset::create(repository).map_err(|error| error.to_string())?;
        let public =
            <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(keyset.kem_public()).map_err(|e| e.to_string())?;
        let info = [b"strandline 2026 data key v1".as_slice(), repository.as_bytes()].concat();
        let (encapsulated, ciphertext) =
            single_shot_seal::<AesGcm256, HkdfSha256, X25519HkdfSha256>(&OpModeS::Base, &public, &info, &key, &[])
                .map_err(|error| error.to_string())?;
        let mut hasher = blake3::Hasher::new_derive_key("strandline 2026 block key v1");
        hasher.update(&key).update(repository.as_bytes()).update(&SALT);
        let (mut block_key, mut commitment) = ([0; 32], [0; 32]);
        let mut output = hasher.finalize_xof();
        output.fill(&mut block_key);
        output.fill(&mut commitment);
        let cipher = UnboundKey::new(&AES_256_GCM, &block_key).map_err(|error| error.to_string())?;
        Ok(Self {
            opener: Opener::new(&keyset),
            keyset,
            wrapped: [encapsulated.to_bytes().as_slice(), &ciphertext].concat(),
            commitment,
            cipher: LessSafeKey::new(cipher),
        })
    }

    /// A block of `chunks` chunks, all said to be empty, whose body opens to `output`.
    fn block(&self, kind: ChunkKind, codec: Codec, chunks: u32, output: &[u8]) -> Vec<u8> {
        let mut table = Vec::new();
        let id = self.keyset.chunk_id(kind, &[], &[]);
        (0..chunks).for_each(|_| encode_row(kind, &id, &[], &mut table));
        let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let header = BlockHeaderV1 {
            kind,
            codec,
            wrap_algorithm: 1,
            wrapped_key_bytes: u16::try_from(self.wrapped.len()).unwrap_or(u16::MAX),
            chunks,
            table_bytes: small(table.len()),
            body_bytes: small(output.len() + TAG_BYTES),
            repository: self.keyset.repository(),
            salt: SALT,
            commitment: self.commitment,
        };
        let mut block = Vec::with_capacity(FIXED_HEADER_BYTES + table.len() + output.len() + 256);
        header.encode(&mut block);
        block.extend_from_slice(&self.wrapped);
        block.extend_from_slice(&table);
        let mut body = output.to_vec();
        let nonce = Nonce::assume_unique_for_key([0; 12]);
        let sealed = self.cipher.seal_in_place_append_tag(nonce, Aad::from(&block), &mut body);
        assert!(sealed.is_ok());
        block.extend_from_slice(&body);
        block.extend_from_slice(blake3::hash(&block).as_bytes());
        block
    }
}

/// First byte: bit 0 says whether the rest is stored or one zstd frame, bit 1 whether it is a block of data or of trees, the
/// others how many chunks it holds. The rest: the codec's output, sealed into an otherwise genuine block.
///
/// What is opened is no longer than the limit, whatever the frame says or does; chunks are never others than their ids say,
/// so only empty ones can come out; their lengths add up to the content.
/// Memory: one block's plaintext at its limit, its tables, the decompressor's own, and what is in the block.
pub fn sealed(data: &[u8]) {
    let Some((&form, output)) = data.split_first() else { return };
    let output = output.get(..limits::BLOCK_BODY_BYTES_MAX - TAG_BYTES).unwrap_or(output);
    let codec = if form & 1 == 0 { Codec::Stored } else { Codec::Zstd };
    let kind = if form & 2 == 0 { ChunkKind::Data } else { ChunkKind::Tree };
    let chunks = u32::from(form >> 2) + 1;
    let forge = &*FORGE;
    let block = forge.block(kind, codec, chunks, output);
    let bytes_max = 2 * PLAINTEXT_BYTES_MAX + (1 << 20) + 8 * block.len();
    within(bytes_max, || {
        let Ok(opened) = forge.opener.open(&block) else { return };
        assert_eq!(opened.rows().len(), chunks as usize);
        assert_eq!(opened.digest().as_bytes().as_slice(), block.get(block.len() - DIGEST_BYTES..).unwrap_or_default());
        let all = opened.span(0..=opened.rows().len() - 1);
        assert!(all.len() + opened.rows().len() * 4 <= PLAINTEXT_BYTES_MAX);
        let empty: ChunkId = forge.keyset.chunk_id(kind, &[], &[]);
        for chunk in opened.chunks().flatten() {
            assert!(chunk.bytes.is_empty() && chunk.id == empty && chunk.references.is_empty());
        }
    });
}
