//! Key slots: the keyset sealed for one holder by a passphrase, a key file or a recovery key.
//!
//! A slot's key is unique by its random salt, so the nonce is zero; everything visible in the slot is authenticated.

use argon2::{Algorithm, Argon2, Params, Version};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use strandline_messages::format::keys::{KeySlotV1, SlotKind};
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::limits;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::{KeyError, Keyset, random};

const ARGON2_MEMORY_KIB: u32 = 64 << 10;
const ARGON2_PASSES: u32 = 3;
const ARGON2_LANES: u32 = 1;

/// What a holder knows. Wiped on drop.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub enum SlotSecret {
    /// The 32 bytes of a key file.
    KeyFile([u8; 32]),
    /// A passphrase.
    Passphrase(String),
    /// The 32 bytes of a recovery key.
    Recovery([u8; 32]),
}

impl SlotSecret {
    /// For people.
    fn name(&self) -> &'static str {
        match self {
            Self::KeyFile(_) => "the key file",
            Self::Passphrase(_) => "the passphrase",
            Self::Recovery(_) => "the recovery key",
        }
    }

    fn fits(&self, kind: &SlotKind) -> bool {
        matches!(
            (self, kind),
            (Self::KeyFile(_), SlotKind::KeyFile)
                | (Self::Passphrase(_), SlotKind::Passphrase { .. })
                | (Self::Recovery(_), SlotKind::Recovery)
        )
    }
}

/// Seals the keyset for one more holder. The label is for people (cut to its limit); `created_ns` is ns since 1970.
pub fn seal_slot(keyset: &Keyset, secret: &SlotSecret, label: &str, created_ns: i64) -> Result<KeySlotV1, KeyError> {
    let kind = match secret {
        SlotSecret::KeyFile(_) => SlotKind::KeyFile,
        SlotSecret::Passphrase(_) => {
            SlotKind::Passphrase { memory_kib: ARGON2_MEMORY_KIB, passes: ARGON2_PASSES, lanes: ARGON2_LANES }
        }
        SlotSecret::Recovery(_) => SlotKind::Recovery,
    };
    seal_slot_as(keyset, secret, label, created_ns, kind)
}

fn seal_slot_as(
    keyset: &Keyset,
    secret: &SlotSecret,
    label: &str,
    created_ns: i64,
    kind: SlotKind,
) -> Result<KeySlotV1, KeyError> {
    let mut slot = KeySlotV1 {
        repository: keyset.repository(),
        id: random()?,
        created_ns,
        label: label.get(..label.floor_char_boundary(limits::TAG_BYTES_MAX)).unwrap_or_default().to_owned(),
        kind,
        salt: random()?,
        sealed: Vec::new(),
    };
    let key = slot_key(&slot, secret)?;
    // The plaintext is copied once, into the vector that becomes the ciphertext: with room for the tag, so that it never moves.
    let plain = keyset.encode();
    let mut sealed = Vec::with_capacity(plain.len() + AES_256_GCM.tag_len());
    sealed.extend_from_slice(&plain);
    key.seal_in_place_append_tag(zero_nonce(), Aad::from(slot.encode_visible()), &mut sealed)
        .map_err(|_| KeyError::Derivation { why: "the keyset cannot be sealed".into() })?;
    slot.sealed = sealed;
    Ok(slot)
}

/// Opens a slot. [`KeyError::WrongKey`] if the secret is of another kind or does not fit.
pub fn open_slot(slot: &KeySlotV1, secret: &SlotSecret) -> Result<Keyset, KeyError> {
    let wrong = || KeyError::WrongKey { tried: format!("{} does not open slot `{}`", secret.name(), slot.label) };
    if !secret.fits(&slot.kind) {
        return Err(wrong());
    }
    let key = slot_key(slot, secret)?;
    let mut buffer = Zeroizing::new(slot.sealed.clone());
    let plain = key.open_in_place(zero_nonce(), Aad::from(slot.encode_visible()), &mut buffer).map_err(|_| wrong())?;
    let keyset = Keyset::decode(plain)?;
    if keyset.repository() != slot.repository {
        return Err(KeyError::ForeignRepository { expected: slot.repository, found: keyset.repository() });
    }
    Ok(keyset)
}

/// A keyset and the slot that it came from.
#[derive(Debug)]
pub struct Unlocked {
    /// The keyset.
    pub keyset: Keyset,
    /// Id of the slot that opened.
    pub slot: [u8; 16],
}

/// Tries every secret on every slot of its kind; damaged and foreign slots are passed over. The keyset must be that of
/// `repository`. At most [`limits::KEY_SLOTS_MAX`] slots are looked at, and a passphrase is tried on at most
/// [`limits::PASSPHRASE_SLOTS_MAX`].
pub fn unlock(slots: &[Vec<u8>], secrets: &[SlotSecret], repository: &RepositoryV1) -> Result<Unlocked, KeyError> {
    let mut tried = Vec::new();
    let mut damaged = None;
    for secret in secrets {
        let mut attempts = 0;
        for bytes in slots.iter().take(limits::KEY_SLOTS_MAX) {
            let slot = match KeySlotV1::decode(bytes) {
                Ok(slot) if slot.repository == repository.id && secret.fits(&slot.kind) => slot,
                Ok(_) => continue,
                Err(error) => {
                    damaged = Some(error);
                    continue;
                }
            };
            if attempts >= limits::PASSPHRASE_SLOTS_MAX && matches!(secret, SlotSecret::Passphrase(_)) {
                break;
            }
            attempts += 1;
            match open_slot(&slot, secret) {
                Ok(keyset) => {
                    keyset.check_repository(repository)?;
                    return Ok(Unlocked { keyset, slot: slot.id });
                }
                Err(KeyError::WrongKey { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        tried.push(match attempts {
            0 => format!("the repository has no slot for {}", secret.name()),
            1 => format!("{} does not open the slot made for one", secret.name()),
            n => format!("{} opens none of {n} slots", secret.name()),
        });
    }
    if tried.is_empty() {
        tried.push("no passphrase and no key file was given or found".into());
    }
    if let Some(error) = damaged {
        tried.push(format!("a slot was passed over because {error}"));
    }
    Err(KeyError::WrongKey { tried: tried.join("; ") })
}

fn zero_nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

fn slot_key(slot: &KeySlotV1, secret: &SlotSecret) -> Result<LessSafeKey, KeyError> {
    let mut key = Zeroizing::new([0u8; 32]);
    match (secret, &slot.kind) {
        (SlotSecret::Passphrase(passphrase), SlotKind::Passphrase { memory_kib, passes, lanes }) => {
            let failed = |error: argon2::Error| KeyError::Derivation { why: error.to_string() };
            let params = Params::new(*memory_kib, *passes, *lanes, Some(32)).map_err(failed)?;
            Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
                .hash_password_into(passphrase.as_bytes(), &slot.salt, key.as_mut_slice())
                .map_err(failed)?;
        }
        (SlotSecret::KeyFile(bytes), _) => mix("strandline 2026 slot key file v1", bytes, &slot.salt, &mut key),
        (SlotSecret::Recovery(bytes), _) => mix("strandline 2026 slot recovery key v1", bytes, &slot.salt, &mut key),
        (SlotSecret::Passphrase(_), _) => {
            return Err(KeyError::Derivation { why: "the slot is not made for a passphrase".into() });
        }
    }
    let key = UnboundKey::new(&AES_256_GCM, key.as_slice())
        .map_err(|_| KeyError::Derivation { why: "the slot's key has a wrong length".into() })?;
    Ok(LessSafeKey::new(key))
}

fn mix(context: &str, secret: &[u8; 32], salt: &[u8; 32], key: &mut [u8; 32]) {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    hasher.update(secret).update(salt);
    hasher.finalize_xof().fill(key);
    // Its buffer holds the secret.
    hasher.zeroize();
}

#[cfg(test)]
mod tests {
    use strandline_messages::RepositoryId;
    use strandline_messages::format::repository::ChunkingV1;

    use super::*;

    const CHUNKING: ChunkingV1 = ChunkingV1 { minimum: 64, average: 64, maximum: 64, block_plaintext: 64 };

    fn keyset() -> Keyset {
        Keyset::create(RepositoryId([1; 16])).unwrap()
    }

    // Argon2id at its real cost is for one test; the others use the smallest memory.
    fn cheap_slot(keyset: &Keyset, passphrase: &str) -> Vec<u8> {
        let kind = SlotKind::Passphrase { memory_kib: 8, passes: 1, lanes: 1 };
        seal_slot_as(keyset, &SlotSecret::Passphrase(passphrase.into()), "laptop", 1, kind).unwrap().encode()
    }

    #[test]
    fn every_kind_of_slot_opens_with_its_secret_only() {
        let keyset = keyset();
        let secrets = [
            SlotSecret::KeyFile([5; 32]),
            SlotSecret::Recovery([5; 32]),
            SlotSecret::Passphrase("correct horse".into()),
        ];
        for (i, secret) in secrets.iter().enumerate() {
            let slot = seal_slot(&keyset, secret, "x", 7).unwrap();
            let slot = KeySlotV1::decode(&slot.encode()).unwrap();
            assert_eq!(open_slot(&slot, secret).unwrap().id_key(), keyset.id_key());
            for (j, other) in secrets.iter().enumerate() {
                assert!(i == j || matches!(open_slot(&slot, other), Err(KeyError::WrongKey { .. })));
            }
        }
        let slot = seal_slot(&keyset, &secrets[0], "x", 7).unwrap();
        assert!(matches!(open_slot(&slot, &SlotSecret::KeyFile([6; 32])), Err(KeyError::WrongKey { .. })));
    }

    #[test]
    fn what_is_visible_in_a_slot_is_authenticated() {
        let secret = SlotSecret::KeyFile([5; 32]);
        let slot = seal_slot(&keyset(), &secret, "x", 7).unwrap();
        assert!(open_slot(&KeySlotV1 { label: "y".into(), ..slot.clone() }, &secret).is_err());
        assert!(open_slot(&KeySlotV1 { created_ns: 8, ..slot }, &secret).is_err());
    }

    #[test]
    fn unlocking_tries_all_slots_and_says_what_it_tried() {
        let keyset = keyset();
        let file = keyset.public_file("main".parse().unwrap(), CHUNKING, 0);
        let slots = vec![
            b"garbage".to_vec(),
            cheap_slot(&keyset, "one"),
            cheap_slot(&keyset, "two"),
            seal_slot(&keyset, &SlotSecret::KeyFile([5; 32]), "", 0).unwrap().encode(),
        ];
        let passphrase = |text: &str| SlotSecret::Passphrase(text.into());
        unlock(&slots, &[passphrase("two")], &file).unwrap();
        let opened = unlock(&slots, &[passphrase("bad"), SlotSecret::KeyFile([5; 32])], &file).unwrap();
        assert_eq!(opened.slot, KeySlotV1::decode(&slots[3]).unwrap().id);
        let error = unlock(&slots, &[passphrase("bad"), SlotSecret::Recovery([0; 32])], &file).unwrap_err();
        let text = error.to_string();
        assert!(error.is_wrong_key());
        for part in ["none of 2 slots", "no slot for the recovery key", "repository is intact", "not a key slot"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(unlock(&slots, &[], &file).unwrap_err().to_string().contains("no passphrase"));
    }

    #[test]
    fn a_replaced_repository_file_is_noticed() {
        let keyset = keyset();
        let slots = vec![cheap_slot(&keyset, "one")];
        let file = keyset.public_file("main".parse().unwrap(), CHUNKING, 0);
        let forged = RepositoryV1 { root_public: *self::keyset().root_public(), ..file };
        let error = unlock(&slots, &[SlotSecret::Passphrase("one".into())], &forged).unwrap_err();
        assert!(matches!(error, KeyError::ForeignRepository { .. }));
    }

    #[test]
    fn s43_impossible_argon2_parameters_are_an_error() {
        let keyset = keyset();
        let slot = KeySlotV1::decode(&cheap_slot(&keyset, "one")).unwrap();
        for (memory_kib, passes, lanes) in [(0, 1, 1), (8, 0, 1), (8, 1, 0), (8, 1, 64)] {
            let slot = KeySlotV1 { kind: SlotKind::Passphrase { memory_kib, passes, lanes }, ..slot.clone() };
            let error = open_slot(&slot, &SlotSecret::Passphrase("one".into())).unwrap_err();
            assert!(matches!(error, KeyError::Derivation { .. }));
        }
    }
}
