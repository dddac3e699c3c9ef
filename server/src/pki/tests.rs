//! What the authority issues, and what it refuses to be told.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use strandline_messages::AgentId;
use strandline_messages::identity::Role;
use x509_parser::extensions::GeneralName;

use super::*;

const YEAR: Duration = Duration::from_hours(24 * 365);

fn identity() -> Identity {
    Identity { tenant: "acme".parse().unwrap(), agent: AgentId([7; 16]), role: Role::Agent }
}

fn request(params: &CertificateParams) -> Vec<u8> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    params.serialize_request(&key).unwrap().der().to_vec()
}

#[test]
fn an_authority_is_made_once_and_reads_back() {
    let data = tempfile::tempdir().unwrap();
    assert!(matches!(Authority::load(data.path()), Err(PkiError::Missing { .. })));
    let made = Authority::create(data.path()).unwrap();
    assert_eq!(Authority::load(data.path()).unwrap().hash(), made.hash());
    assert!(matches!(Authority::create(data.path()), Err(PkiError::Exists { .. })));
    assert_eq!(Authority::load(data.path()).unwrap().hash(), made.hash());
    for name in ["ca.key", "ca.crt"] {
        let mode = fs::metadata(data.path().join("pki").join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[test]
fn a_damaged_or_foreign_key_is_named() {
    let (data, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    Authority::create(data.path()).unwrap();
    Authority::create(other.path()).unwrap();
    fs::copy(other.path().join("pki/ca.key"), data.path().join("pki/ca.key")).unwrap();
    let error = Authority::load(data.path()).unwrap_err().to_string();
    assert!(error.contains("does not belong to ca.key"), "{error}");
    fs::write(data.path().join("pki/ca.key"), "rubbish").unwrap();
    assert!(matches!(Authority::load(data.path()), Err(PkiError::Damaged { .. })));
}

#[test]
fn a_server_certificate_is_kept_until_names_change_or_its_end_is_near() {
    let data = tempfile::tempdir().unwrap();
    let authority = Authority::create(data.path()).unwrap();
    let names = ["backup.example.com".to_owned(), "10.0.0.1".to_owned(), "::1".to_owned()];
    let first = authority.server(&names).unwrap();
    let mut reordered = names.clone();
    reordered.reverse();
    assert_eq!(authority.server(&reordered).unwrap().chain, first.chain);
    let renamed = authority.server(&names[..2]).unwrap();
    assert_ne!(renamed.chain, first.chain);
    let short = authority.issue_server(&names, SERVER_RENEWAL / 2).unwrap();
    assert_ne!(authority.server(&names).unwrap().chain, short.chain);
    assert!(matches!(authority.server(&["a b".to_owned()]), Err(PkiError::Name { .. })));
}

#[test]
fn a_server_certificate_of_another_authority_is_replaced() {
    let (data, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let names = ["localhost".to_owned()];
    let authority = Authority::create(data.path()).unwrap();
    let foreign = Authority::create(other.path()).unwrap().server(&names).unwrap();
    for name in ["server.key", "server.crt"] {
        fs::copy(other.path().join("pki").join(name), data.path().join("pki").join(name)).unwrap();
    }
    assert_ne!(authority.server(&names).unwrap().chain[0], foreign.chain[0]);
}

#[test]
fn an_agent_certificate_says_who_its_holder_is() {
    let data = tempfile::tempdir().unwrap();
    let authority = Authority::create(data.path()).unwrap();
    let key = ProvenKey::from_request(&request(&CertificateParams::default())).unwrap();
    let certificate = authority.issue_agent(&key, &identity(), YEAR).unwrap();
    assert_eq!(identity_of(&certificate).unwrap(), identity());
    assert_eq!(key_hash_of(&certificate).unwrap(), key.hash());
    let again = authority.issue_agent(&key, &identity(), YEAR).unwrap();
    let serial = |der: &CertificateDer<'_>| x509_parser::parse_x509_certificate(der).unwrap().1.raw_serial().to_vec();
    assert_ne!(serial(&certificate), serial(&again));
}

#[test]
fn s41_what_a_request_asks_for_beyond_its_key_is_overridden() {
    let data = tempfile::tempdir().unwrap();
    let authority = Authority::create(data.path()).unwrap();
    let mut greedy = CertificateParams::new(vec!["backup.example.com".to_owned()]).unwrap();
    greedy.subject_alt_names.push(SanType::URI("strandline://other/00".try_into().unwrap()));
    greedy.distinguished_name.push(DnType::CommonName, "root");
    greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    greedy.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    greedy.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::Any];
    let key = ProvenKey::from_request(&request(&greedy)).unwrap();
    let certificate = authority.issue_agent(&key, &identity(), YEAR).unwrap();
    assert_eq!(identity_of(&certificate).unwrap(), identity());
    let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).unwrap();
    assert!(!parsed.is_ca());
    assert!(!parsed.key_usage().unwrap().unwrap().value.key_cert_sign());
    let names = &parsed.subject_alternative_name().unwrap().unwrap().value.general_names;
    assert!(matches!(names.as_slice(), [GeneralName::URI(_)]), "{names:?}");
}

#[test]
fn s43_a_request_without_proof_of_its_key_is_refused() {
    let good = request(&CertificateParams::default());
    for position in [good.len() - 5, good.len() / 2, 40] {
        let mut bad = good.clone();
        bad[position] ^= 1;
        assert!(matches!(ProvenKey::from_request(&bad), Err(PkiError::Request { .. })), "byte {position}");
    }
    for cut in 0..good.len() {
        assert!(ProvenKey::from_request(&good[..cut]).is_err());
    }
    let mut long = good;
    long.push(0);
    assert!(ProvenKey::from_request(&long).is_err());
    let weak = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let weak = CertificateParams::default().serialize_request(&weak).unwrap();
    assert!(ProvenKey::from_request(weak.der()).is_err());
}

#[test]
fn s41_a_certificate_that_is_not_exactly_an_agents_names_nobody() {
    let data = tempfile::tempdir().unwrap();
    let authority = Authority::create(data.path()).unwrap();
    let server = authority.server(&["localhost".to_owned()]).unwrap();
    assert_eq!(identity_of(&server.chain[0]), Err(PeerError::Purpose));
    assert_eq!(identity_of(authority.certificate()), Err(PeerError::Purpose));
    assert_eq!(identity_of(&CertificateDer::from(vec![0; 9])), Err(PeerError::Malformed));
    let uri = |text: &str| SanType::URI(text.to_owned().try_into().unwrap());
    let good = identity();
    for (names, common) in [
        (vec![], good.agent.to_string()),
        (vec![uri(&good.uri()), uri(&good.uri())], good.agent.to_string()),
        (vec![uri("https://acme")], good.agent.to_string()),
        (vec![uri(&good.uri())], "somebody else".to_owned()),
    ] {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names;
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let certificate = params.signed_by(&key, &authority.issuer().unwrap()).unwrap().into();
        assert_eq!(identity_of(&certificate), Err(PeerError::Name));
    }
}

#[test]
fn no_certificate_outlives_its_authority() {
    let data = tempfile::tempdir().unwrap();
    let authority = Authority::create(data.path()).unwrap();
    let key = ProvenKey::from_request(&request(&CertificateParams::default())).unwrap();
    let certificate = authority.issue_agent(&key, &identity(), Duration::MAX).unwrap();
    let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).unwrap();
    assert!(parsed.validity().not_after.timestamp() <= authority.expires_s());
}
