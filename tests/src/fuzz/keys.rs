//! Key slots and what is in them. Parsing only: deriving a key from a passphrase is meant to be slow.

use strandline_agent::keys::Keyset;
use strandline_messages::format::cursor::Decoder;
use strandline_messages::format::keys::{KeySlotV1, KeysetV1, SlotKind, WriterCertificateV1};
use strandline_messages::limits;

use super::formats::{decoded_memory, with_digest};
use super::memory::within;

/// A key slot, its digest as it is and made right. It is encoded to bytes that are decoded to the same, and asks for no more
/// memory, passes and lanes than the limits say.
pub fn key_slot(data: &[u8]) {
    for bytes in [data, &with_digest(data)] {
        let decoded = within(decoded_memory(bytes.len()), || KeySlotV1::decode(bytes));
        let Ok(slot) = decoded else { continue };
        assert_eq!(KeySlotV1::decode(&slot.encode()).as_ref(), Ok(&slot));
        assert!(slot.encode().starts_with(&slot.encode_visible()));
        if let SlotKind::Passphrase { memory_kib, passes, lanes } = slot.kind {
            assert!(memory_kib <= limits::ARGON2_MEMORY_KIB_MAX);
            assert!(passes <= limits::ARGON2_PASSES_MAX && lanes <= limits::ARGON2_LANES_MAX);
        }
    }
}

/// The plaintext of a slot, and a writer certificate. Both are encoded to the same bytes; secrets that do not belong together
/// are refused.
pub fn keyset(data: &[u8]) {
    let decoded = within(decoded_memory(data.len()), || KeysetV1::decode(data));
    if let Ok(keyset) = decoded {
        assert_eq!(keyset.encode(), data);
        if let Ok(opened) = Keyset::from_plain(keyset.clone()) {
            assert_eq!(opened.capability(), keyset.writer.capability);
        }
    }
    let mut decoder = Decoder::new(data, "writer certificate");
    if let Ok(certificate) = WriterCertificateV1::decode(&mut decoder) {
        let mut again = Vec::new();
        certificate.encode(&mut again);
        assert!(data.starts_with(&again) && again.len() == WriterCertificateV1::BYTES);
        certificate.domain();
    }
}
