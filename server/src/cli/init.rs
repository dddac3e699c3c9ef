//! `strand-server init`: a data directory with an authority and a configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};

use super::InitArguments;
use crate::catalog::Catalog;
use crate::config::{CONFIG_NAME, Config, write_initial};
use crate::pki::{Authority, PkiError, files};
use crate::storage::layout::{DataPaths, LOCK_NAME};
use crate::storage::lock::DirectoryLock;
use crate::tenancy::Tenancy;

/// What `init` made.
#[derive(Debug)]
pub(super) struct Initialised {
    /// The data directory.
    pub(super) data: PathBuf,
    /// Its configuration.
    pub(super) config: Config,
}

/// Makes a server in `data`. The configuration is written last: until it is there, an interrupted `init` can be run again.
pub(super) async fn init(data: &Path, arguments: &InitArguments, lock_wait: Duration) -> anyhow::Result<Initialised> {
    refuse_foreign(data)?;
    files::create_directory(data).with_context(|| format!("cannot create {}", data.display()))?;
    let paths = DataPaths::new(data);
    let _lock = DirectoryLock::take(data, &paths.lock(), lock_wait)?;
    files::remove_unfinished(data).with_context(|| format!("cannot clean {}", data.display()))?;
    let config_path = data.join(CONFIG_NAME);
    if config_path.exists() {
        bail!("{}", describe_existing(data).await);
    }
    let names = if arguments.names.is_empty() { own_name() } else { arguments.names.clone() };
    let authority = match Authority::load(data) {
        Err(PkiError::Missing { .. }) => Authority::create(data),
        loaded => loaded,
    }?;
    let catalog = Catalog::open(&paths.catalog()).await?;
    Tenancy::open(catalog.pool().clone(), data).await?;
    catalog.close().await?;
    let config = write_initial(&config_path, &names, &arguments.listen, &arguments.advertise)?;
    authority.server(&config.names)?;
    Ok(Initialised { data: data.to_owned(), config })
}

/// A directory that holds something else is left alone.
fn refuse_foreign(data: &Path) -> anyhow::Result<()> {
    let entries = match fs::read_dir(data) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", data.display())),
    };
    let ours = [LOCK_NAME, CONFIG_NAME, "catalog.sqlite", "storage", "pki", "lost+found"];
    let mut foreign = None;
    for entry in entries {
        let name = entry.with_context(|| format!("cannot read {}", data.display()))?.file_name();
        if ours.iter().any(|ours| name == *ours && *ours != "lost+found") {
            return Ok(());
        }
        if name != "lost+found" {
            foreign = Some(name);
        }
    }
    match foreign {
        None => Ok(()),
        Some(name) => bail!(
            "{} is not empty (it holds {}) and is no Strandline directory: choose an empty one. Nothing was changed",
            data.display(),
            name.display()
        ),
    }
}

async fn describe_existing(data: &Path) -> String {
    let mut text = format!("there is a server in {} already; nothing was changed. It has ", data.display());
    match Authority::load(data) {
        Ok(authority) => {
            let expires = super::output::date(authority.expires_s().saturating_mul(1_000_000_000));
            text += &["an authority valid until ", &expires].concat();
        }
        Err(_) => text.push_str("no usable authority (pki/)"),
    }
    let tenants = async {
        let catalog = Catalog::open(&DataPaths::new(data).catalog()).await.ok()?;
        let tenants = Tenancy::open(catalog.pool().clone(), data).await.ok()?.tenants().await.ok()?;
        Some(tenants.iter().map(|tenant| tenant.name.to_string()).collect::<Vec<_>>())
    };
    match tenants.await {
        Some(names) if names.is_empty() => text.push_str(" and no tenants"),
        Some(names) => text += &[" and ", &names.len().to_string(), " tenants (", &shortened(&names), ")"].concat(),
        None => text.push_str(" and a catalog that cannot be read"),
    }
    text
}

fn shortened(names: &[String]) -> String {
    let mut text = names.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > 5 {
        text.push_str(", …");
    }
    text
}

/// This machine's name, if it has a usable one.
fn own_name() -> Vec<String> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    let usable = rustls::pki_types::DnsName::try_from(name).is_ok() && name != "localhost";
    usable.then(|| name.to_owned()).into_iter().collect()
}
