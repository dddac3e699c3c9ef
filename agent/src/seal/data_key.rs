//! Data keys: made per session, wrapped to the repository's public key, never stored in the clear.

use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, Nonce, UnboundKey};
use hpke::aead::AesGcm256;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, OpModeR, OpModeS, Serializable, single_shot_open, single_shot_seal};
use strandline_messages::RepositoryId;
use zeroize::{Zeroize, Zeroizing};

use super::{OpenError, SealError};
use crate::keys::{Keyset, WRAP_X25519_HPKE, random};

/// Bytes of a wrapped data key: encapsulated key, ciphertext, tag.
const ENCAPSULATED_BYTES: usize = 32;

/// A session's data key with its wrapped form. Cheap to clone; wiped when the last clone is dropped.
#[derive(Clone)]
pub struct DataKey {
    key: Arc<Zeroizing<[u8; 32]>>,
    wrapped: Arc<[u8]>,
    repository: RepositoryId,
}

/// Which derivation a key is for: context strings of the key and of its salt.
#[derive(Clone, Copy)]
pub(super) struct Purpose {
    key_context: &'static str,
    salt_context: &'static str,
}

/// Keys of blocks.
pub(super) const BLOCK: Purpose =
    Purpose { key_context: "strandline 2026 block key v1", salt_context: "strandline 2026 block salt v1" };
/// Keys of the details in manifests.
pub(super) const DETAILS: Purpose = Purpose {
    key_context: "strandline 2026 snapshot details v1",
    salt_context: "strandline 2026 snapshot details salt v1",
};

impl DataKey {
    /// Makes a random data key and wraps it to the repository's public key.
    pub fn generate(keyset: &Keyset) -> Result<Self, SealError> {
        let key = Zeroizing::new(random()?);
        let public = <X25519HkdfSha256 as Kem>::PublicKey::from_bytes(keyset.kem_public())
            .map_err(|_| SealError::Crypto { what: "the repository's public key is malformed" })?;
        let (encapsulated, ciphertext) = single_shot_seal::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
            &OpModeS::Base,
            &public,
            &wrap_info(&keyset.repository()),
            key.as_slice(),
            &[],
        )
        .map_err(|_| SealError::Crypto { what: "the data key cannot be wrapped" })?;
        let wrapped = [encapsulated.to_bytes().as_slice(), &ciphertext].concat();
        Ok(Self { key: Arc::new(key), wrapped: wrapped.into(), repository: keyset.repository() })
    }

    /// The wrapped form that travels in every block, 80 bytes.
    pub fn wrapped(&self) -> &[u8] {
        &self.wrapped
    }

    /// Id of the wrapping algorithm.
    pub fn wrap_algorithm(&self) -> u8 {
        WRAP_X25519_HPKE
    }

    /// The repository.
    pub fn repository(&self) -> RepositoryId {
        self.repository
    }

    /// Unwraps with the repository's private key. `what` names the thing in errors.
    pub(super) fn unwrap(
        keyset: &Keyset,
        algorithm: u8,
        wrapped: &[u8],
        what: &'static str,
    ) -> Result<Self, OpenError> {
        if algorithm != WRAP_X25519_HPKE {
            return Err(OpenError::UnknownWrapping { algorithm });
        }
        let private = keyset.kem_private().ok_or(OpenError::NoReadCapability)?;
        let refused = || OpenError::Unwrap { what };
        let (encapsulated, ciphertext) = wrapped.split_at_checked(ENCAPSULATED_BYTES).ok_or_else(refused)?;
        let private = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(private).map_err(|_| refused())?;
        let encapsulated = <X25519HkdfSha256 as Kem>::EncappedKey::from_bytes(encapsulated).map_err(|_| refused())?;
        let plain = single_shot_open::<AesGcm256, HkdfSha256, X25519HkdfSha256>(
            &OpModeR::Base,
            &private,
            &encapsulated,
            &wrap_info(&keyset.repository()),
            ciphertext,
            &[],
        );
        let plain = Zeroizing::new(plain.map_err(|_| refused())?);
        let key: [u8; 32] = plain.as_slice().try_into().map_err(|_| refused())?;
        Ok(Self { key: Arc::new(Zeroizing::new(key)), wrapped: wrapped.into(), repository: keyset.repository() })
    }

    /// A salt that depends on everything that will be sealed (`parts`) and on 32 random bytes: the same salt for
    /// different bytes cannot occur even if the random bytes repeat.
    pub(super) fn salt(&self, purpose: Purpose, random: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
        let key = Zeroizing::new(blake3::derive_key(purpose.salt_context, self.key.as_slice()));
        let mut hasher = blake3::Hasher::new_keyed(&key);
        hasher.update(random);
        for part in parts {
            hasher.update(part);
        }
        let salt = *hasher.finalize().as_bytes();
        hasher.zeroize();
        salt
    }

    /// The key for one sealing, and the commitment to it.
    pub(super) fn derive(&self, purpose: Purpose, salt: &[u8; 32]) -> Derived {
        let mut hasher = blake3::Hasher::new_derive_key(purpose.key_context);
        hasher.update(self.key.as_slice()).update(self.repository.as_bytes()).update(salt);
        let mut output = hasher.finalize_xof();
        let mut derived = Derived { key: Zeroizing::new([0; 32]), commitment: [0; 32] };
        output.fill(derived.key.as_mut_slice());
        output.fill(&mut derived.commitment);
        // Their buffers hold the data key.
        hasher.zeroize();
        output.zeroize();
        derived
    }
}

/// The key of one block or manifest.
pub(super) struct Derived {
    key: Zeroizing<[u8; 32]>,
    /// Commits to the key.
    pub(super) commitment: [u8; 32],
}

impl Derived {
    /// The cipher, or nothing if the library refuses the key.
    pub(super) fn cipher(&self) -> Option<LessSafeKey> {
        UnboundKey::new(&AES_256_GCM, self.key.as_slice()).ok().map(LessSafeKey::new)
    }

    /// Compares in constant time.
    pub(super) fn commits_to(&self, stored: &[u8; 32]) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.commitment, stored).is_ok()
    }
}

/// Every derived key seals one message, so its nonce is zero.
pub(super) fn zero_nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

fn wrap_info(repository: &RepositoryId) -> Vec<u8> {
    [b"strandline 2026 data key v1".as_slice(), repository.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use strandline_messages::format::keys::Capability;

    use super::*;

    fn keyset(id: u8) -> Keyset {
        Keyset::create(RepositoryId([id; 16])).unwrap()
    }

    #[test]
    fn a_wrapped_data_key_unwraps_with_the_private_key_only() {
        let keyset = keyset(1);
        let key = DataKey::generate(&keyset).unwrap();
        assert_eq!(key.wrapped().len(), 80);
        let again = DataKey::unwrap(&keyset, 1, key.wrapped(), "block").unwrap();
        assert_eq!(again.key, key.key);
        let other = DataKey::unwrap(&self::keyset(1), 1, key.wrapped(), "block");
        assert!(matches!(other, Err(OpenError::Unwrap { .. })));
        let writer = keyset.narrowed(Capability::Write).unwrap();
        assert!(matches!(DataKey::unwrap(&writer, 1, key.wrapped(), "block"), Err(OpenError::NoReadCapability)));
        assert!(matches!(
            DataKey::unwrap(&keyset, 9, key.wrapped(), "block"),
            Err(OpenError::UnknownWrapping { algorithm: 9 })
        ));
    }

    #[test]
    fn s43_no_wrapped_form_panics() {
        let keyset = keyset(1);
        let good = DataKey::generate(&keyset).unwrap();
        for len in 0..good.wrapped().len() {
            assert!(DataKey::unwrap(&keyset, 1, &good.wrapped()[..len], "block").is_err());
        }
        for place in 0..good.wrapped().len() {
            let mut bad = good.wrapped().to_vec();
            bad[place] ^= 4;
            assert!(DataKey::unwrap(&keyset, 1, &bad, "block").is_err(), "byte {place}");
        }
    }

    #[test]
    fn purposes_and_salts_separate_keys() {
        let key = DataKey::generate(&keyset(1)).unwrap();
        let a = key.derive(BLOCK, &[1; 32]);
        let b = key.derive(DETAILS, &[1; 32]);
        let c = key.derive(BLOCK, &[2; 32]);
        assert!(a.key != b.key && a.key != c.key && a.commitment != b.commitment);
        assert_ne!(a.key.as_slice(), a.commitment);
    }

    #[test]
    fn s51_a_repeated_random_still_gives_other_keys_for_other_bytes() {
        let key = DataKey::generate(&keyset(1)).unwrap();
        let one = key.salt(BLOCK, &[9; 32], &[b"header", b"one"]);
        let two = key.salt(BLOCK, &[9; 32], &[b"header", b"two"]);
        assert_ne!(one, two);
        assert_ne!(key.derive(BLOCK, &one).key, key.derive(BLOCK, &two).key);
    }
}
