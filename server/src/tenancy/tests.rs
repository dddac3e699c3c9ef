//! Tokens, enrolment, revocation, and what is left when the catalog is not.

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode};
use strandline_messages::identity::Identity;
use tempfile::TempDir;

use super::enrol::Machine;
use super::*;
use crate::pki::{Authority, identity_of, key_hash_of};

const DAY: Duration = Duration::from_hours(24);

struct Site {
    data: TempDir,
    tenancy: Tenancy,
}

async fn pool(data: &Path) -> SqlitePool {
    let options = SqliteConnectOptions::new()
        .filename(data.join("catalog.sqlite"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .foreign_keys(true);
    SqlitePool::connect_with(options).await.unwrap()
}

impl Site {
    async fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let tenancy = Tenancy::open(pool(data.path()).await, data.path()).await.unwrap();
        tenancy.add_tenant(&acme()).await.unwrap();
        Self { data, tenancy }
    }

    async fn reopen(self) -> Result<Self, TenancyError> {
        self.tenancy.pool.close().await;
        let tenancy = Tenancy::open(pool(self.data.path()).await, self.data.path()).await?;
        Ok(Self { data: self.data, tenancy })
    }

    /// As after a lost catalog: only the storage is left.
    async fn rebuilt(self) -> Result<Self, TenancyError> {
        self.tenancy.pool.close().await;
        for name in ["catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"] {
            let _ = std::fs::remove_file(self.data.path().join(name));
        }
        self.reopen().await
    }

    async fn enrolled(&self, number: u8) -> Identity {
        let (secret, _) = self.tenancy.create_token(&acme(), TOKEN_VALIDITY_MAX).await.unwrap();
        self.tenancy.redeem_token(&secret, &machine(number)).await.unwrap()
    }

    async fn lets_in(&self, identity: &Identity, number: u8) -> bool {
        self.tenancy.is_enrolled(identity.agent, &identity.tenant, &machine(number).key_hash).await.unwrap()
    }
}

fn acme() -> TenantName {
    "acme".parse().unwrap()
}

fn machine(number: u8) -> Machine {
    Machine { label: format!("host{number}"), key_hash: [number; 32], validity: DAY }
}

fn request(key: &KeyPair) -> Vec<u8> {
    CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
}

#[tokio::test]
async fn a_tenant_is_added_once_and_cannot_be_called_like_the_journal() {
    let site = Site::new().await;
    assert!(matches!(site.tenancy.add_tenant(&acme()).await, Err(TenancyError::TenantExists(_))));
    let reserved = JOURNAL_NAME.parse().unwrap();
    assert!(matches!(site.tenancy.add_tenant(&reserved).await, Err(TenancyError::TenantReserved(_))));
    site.enrolled(1).await;
    let tenants = site.tenancy.tenants().await.unwrap();
    assert_eq!(tenants.iter().map(|tenant| (tenant.name.as_str(), tenant.agents)).collect::<Vec<_>>(), [("acme", 1)]);
}

#[tokio::test]
async fn s46_a_token_enrols_one_machine_once() {
    let site = Site::new().await;
    let (secret, _) = site.tenancy.create_token(&acme(), TOKEN_VALIDITY_MAX).await.unwrap();
    let (one, two) = (machine(1), machine(2));
    let (first, second) =
        tokio::join!(site.tenancy.redeem_token(&secret, &one), site.tenancy.redeem_token(&secret, &two));
    assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
    let again = site.tenancy.redeem_token(&secret, &one).await;
    assert!(matches!(again, Err(EnrolError::TokenRefused)), "{again:?}");
    assert_eq!(site.tenancy.agents(Some(&acme())).await.unwrap().len(), 1);
}

#[tokio::test]
async fn s46_used_expired_unknown_and_future_tokens_are_refused_alike() {
    let site = Site::new().await;
    let mut refusals = Vec::new();
    let (used, _) = site.tenancy.create_token(&acme(), TOKEN_VALIDITY_MAX).await.unwrap();
    site.tenancy.redeem_token(&used, &machine(1)).await.unwrap();
    let (expired, _) = site.tenancy.create_token(&acme(), Duration::ZERO).await.unwrap();
    let (future, _) = site.tenancy.create_token(&acme(), TOKEN_VALIDITY_MAX).await.unwrap();
    sqlx::query("UPDATE tokens SET created_ns = created_ns + ?, expires_ns = expires_ns + ? WHERE hash = ?")
        .bind(ns(DAY))
        .bind(ns(DAY))
        .bind(token_hash(&future))
        .execute(&site.tenancy.pool)
        .await
        .unwrap();
    for secret in [used, expired, future, EnrolmentSecret([0; 32])] {
        refusals.push(site.tenancy.redeem_token(&secret, &machine(2)).await.unwrap_err().to_string());
    }
    assert!(refusals.iter().all(|text| *text == EnrolError::TokenRefused.to_string()), "{refusals:?}");
}

#[tokio::test]
async fn s46_a_token_is_good_for_an_hour_at_most_and_is_stored_hashed() {
    let site = Site::new().await;
    let longer = TOKEN_VALIDITY_MAX + Duration::from_secs(1);
    assert!(matches!(site.tenancy.create_token(&acme(), longer).await, Err(TenancyError::TokenTooLong)));
    let other = "other".parse().unwrap();
    let refused = site.tenancy.create_token(&other, TOKEN_VALIDITY_MAX).await;
    assert!(matches!(refused, Err(TenancyError::NoSuchTenant(_))));
    let (secret, _) = site.tenancy.create_token(&acme(), TOKEN_VALIDITY_MAX).await.unwrap();
    let site = site.reopen().await.unwrap();
    site.tenancy.pool.close().await;
    for entry in std::fs::read_dir(site.data.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            assert!(!bytes.windows(32).any(|window| window == secret.0), "{}", path.display());
        }
    }
}

#[tokio::test]
async fn enrolment_gives_a_certificate_and_a_bad_request_does_not_spend_the_token() {
    let site = Site::new().await;
    let authority = Authority::create(site.data.path()).unwrap();
    let (secret, _) = site.tenancy.create_token(&acme(), TOKEN_VALIDITY_MAX).await.unwrap();
    let refused = enrol(&site.tenancy, &authority, &secret, "h", b"rubbish", DAY).await;
    assert!(matches!(refused, Err(EnrolError::Request(_))));
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let label = format!("ho\nst\u{1b}[31m{}", "x".repeat(1000));
    let enrolled = enrol(&site.tenancy, &authority, &secret, &label, &request(&key), DAY).await.unwrap();
    assert_eq!(identity_of(&enrolled.certificate).unwrap(), enrolled.identity);
    assert_eq!(enrolled.identity.tenant, acme());
    let key_hash = key_hash_of(&enrolled.certificate).unwrap();
    assert!(site.tenancy.is_enrolled(enrolled.identity.agent, &acme(), &key_hash).await.unwrap());
    let record = site.tenancy.agent(enrolled.identity.agent).await.unwrap().unwrap();
    assert!(record.label.starts_with("host[31mxx") && record.label.len() == LABEL_BYTES_MAX);
}

#[tokio::test]
async fn renewal_keeps_the_key_and_needs_an_enrolled_agent() {
    let site = Site::new().await;
    let authority = Authority::create(site.data.path()).unwrap();
    let (secret, _) = site.tenancy.create_token(&acme(), TOKEN_VALIDITY_MAX).await.unwrap();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let first = enrol(&site.tenancy, &authority, &secret, "h", &request(&key), DAY).await.unwrap();
    let agent = first.identity.agent;
    let identity = first.identity;
    let before = site.tenancy.agent(agent).await.unwrap().unwrap().expires_ns;
    let second = renew(&site.tenancy, &authority, identity.clone(), &request(&key), 2 * DAY).await.unwrap();
    assert_eq!(identity_of(&second.certificate).unwrap(), identity);
    let site = site.rebuilt().await.unwrap();
    assert!(site.tenancy.agent(agent).await.unwrap().unwrap().expires_ns > before);
    let other = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let refused = renew(&site.tenancy, &authority, identity.clone(), &request(&other), DAY).await;
    assert!(matches!(refused, Err(EnrolError::NotEnrolled)));
    site.tenancy.revoke(agent).await.unwrap();
    let refused = renew(&site.tenancy, &authority, identity.clone(), &request(&key), DAY).await;
    assert!(matches!(refused, Err(EnrolError::NotEnrolled)));
}

#[tokio::test]
async fn s41_only_the_enrolled_key_of_the_right_tenant_is_let_in() {
    let site = Site::new().await;
    let identity = site.enrolled(1).await;
    assert!(site.lets_in(&identity, 1).await);
    assert!(!site.lets_in(&identity, 2).await);
    let foreign = Identity { tenant: "other".parse().unwrap(), ..identity.clone() };
    assert!(!site.lets_in(&foreign, 1).await);
    let revoked = site.tenancy.revoke(identity.agent).await.unwrap();
    assert!(!site.lets_in(&identity, 1).await);
    assert_eq!(revoked.state(0), AgentState::Revoked);
    assert_eq!(site.tenancy.revoke(identity.agent).await.unwrap(), revoked);
    let unknown = AgentId([0; 16]);
    assert!(matches!(site.tenancy.revoke(unknown).await, Err(TenancyError::NoSuchAgent(_))));
}

#[tokio::test]
async fn s52_a_rebuilt_catalog_knows_everybody_and_revoked_stays_revoked() {
    let site = Site::new().await;
    let (one, two) = (site.enrolled(1).await, site.enrolled(2).await);
    site.tenancy.revoke(two.agent).await.unwrap();
    let (token, _) = site.tenancy.create_token(&acme(), TOKEN_VALIDITY_MAX).await.unwrap();
    let before = site.tenancy.agents(None).await.unwrap();
    let site = site.rebuilt().await.unwrap();
    assert_eq!(site.tenancy.agents(None).await.unwrap(), before);
    assert!(site.lets_in(&one, 1).await);
    assert!(!site.lets_in(&two, 2).await);
    assert!(matches!(site.tenancy.redeem_token(&token, &machine(3)).await, Err(EnrolError::TokenRefused)));
}

#[tokio::test]
async fn s24_an_event_journalled_before_a_crash_counts_after_it() {
    let site = Site::new().await;
    let identity = site.enrolled(1).await;
    let event = Event::AgentRevoked { agent: AgentIdText(identity.agent), at_ns: 5 };
    site.tenancy.remember(event).await.unwrap();
    assert!(site.lets_in(&identity, 1).await);
    let site = site.reopen().await.unwrap();
    assert!(!site.lets_in(&identity, 1).await);
}

#[tokio::test]
async fn s52_a_damaged_journal_lets_nobody_into_a_new_catalog_and_leaves_an_intact_one_alone() {
    let site = Site::new().await;
    let identity = site.enrolled(1).await;
    let path = site.data.path().join("storage").join(JOURNAL_NAME);
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 10;
    bytes[last] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let site = site.reopen().await.unwrap();
    assert!(site.lets_in(&identity, 1).await);
    let refused = site.rebuilt().await.map(|_| ()).unwrap_err();
    assert!(matches!(&refused, TenancyError::JournalDamaged { lines, .. } if *lines == [2]), "{refused}");
}

#[tokio::test]
async fn what_was_last_seen_is_noted() {
    let site = Site::new().await;
    let identity = site.enrolled(1).await;
    site.tenancy.seen(identity.agent, 77).await.unwrap();
    assert_eq!(site.tenancy.agents(Some(&acme())).await.unwrap()[0].last_seen_ns, Some(77));
    let other = "other".parse().unwrap();
    assert!(matches!(site.tenancy.agents(Some(&other)).await, Err(TenancyError::NoSuchTenant(_))));
}
