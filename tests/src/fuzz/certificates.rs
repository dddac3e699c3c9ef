//! Certificates and certificate requests, as a server reads them.

use strandline_messages::limits;
use strandline_server::pki::{ProvenKey, identity_of, key_hash_of};

use super::memory::within;

/// DER, once as a certificate request of somebody who has nothing but a token, once as the certificate of a peer.
///
/// An identity that is found in a certificate is one that could have been issued.
/// Memory: the longest certificate that is looked at, decoded.
pub fn certificates(data: &[u8]) {
    let bytes_max = 64 * limits::CERTIFICATE_BYTES_MAX;
    if let Ok(proven) = within(bytes_max, || ProvenKey::from_request(data)) {
        assert_ne!(proven.hash(), [0; 32]);
    }
    let certificate = data.to_vec().into();
    let _ = within(bytes_max, || key_hash_of(&certificate));
    if let Ok(identity) = within(bytes_max, || identity_of(&certificate)) {
        assert_eq!(strandline_messages::Identity::from_uri(&identity.uri()), Some(identity.clone()));
        super::formats::check_name(identity.tenant.as_str().as_bytes());
    }
}
