//! From the command line to an open repository: where it is, who serves it, which key opens it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{anyhow, bail};
use serde::Serialize;
use strandline_actors::control_channel::AskError;
use strandline_actors::runtime::clock;
use strandline_messages::identity::ServerAddress;
use strandline_messages::wire::RefusalCode;
use strandline_messages::{RepositoryId, RepositoryName};
use zeroize::Zeroizing;

use super::Fate;
use super::args::Global;
use super::output;
use super::secrets;
use super::settings::Place;
use crate::chunk::default_chunking;
use crate::embedded::{Embedded, LOCAL_REPOSITORY, is_repository};
use crate::identity::{Credentials, Store};
use crate::keys::{
    Keyset, SlotSecret, Unlocked, format_recovery_key, key_file_path, load_key_file, random, seal_slot, store_key_file,
    unlock,
};
use crate::net::tls::TlsConnector;
use crate::net::{Client, ClientError, RepositoryInfo};

/// Where a repository is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A local directory.
    Directory(PathBuf),
    /// A repository of a server.
    Server(ServerAddress, RepositoryName),
}

impl Location {
    /// From `--repository` or the settings.
    pub fn find(global: &Global, place: &Place) -> anyhow::Result<Self> {
        let text = global.repository.as_ref().or(place.settings.repository.as_ref()).ok_or_else(|| {
            anyhow!("no repository given: use -r DIRECTORY or -r strand://HOST/REPOSITORY, or set STRAND_REPOSITORY")
        })?;
        Self::parse(text)
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let Some(rest) = text.strip_prefix("strand://") else {
            if text.is_empty() || text.contains("://") {
                bail!("`{text}` is neither a directory nor strand://HOST[:PORT]/REPOSITORY");
            }
            return Ok(Self::Directory(std::path::absolute(text)?));
        };
        let (server, name) = rest
            .split_once('/')
            .ok_or_else(|| anyhow!("`{text}` names no repository: write strand://HOST[:PORT]/REPOSITORY"))?;
        Ok(Self::Server(server.parse()?, name.parse()?))
    }
}

/// A server that is ready to be asked, in this process or elsewhere.
pub struct Connected {
    /// Asks it.
    pub client: Client,
    /// The repository's name there.
    pub name: RepositoryName,
    /// The directory, if it is a local one.
    pub directory: Option<PathBuf>,
    embedded: Option<Embedded>,
}

impl Connected {
    /// Reaches the server. `create`: a directory that is no repository yet may become one.
    pub async fn open(location: &Location, create: bool, global: &Global, place: &Place) -> anyhow::Result<Self> {
        match location {
            Location::Directory(directory) => {
                let embedded = Embedded::open(directory, create, global.lock_wait).await?;
                let client = Client::start(embedded.connector());
                let name = LOCAL_REPOSITORY.parse()?;
                Ok(Self { client, name, directory: Some(directory.clone()), embedded: Some(embedded) })
            }
            Location::Server(server, name) => {
                let store = Store::new(&place.config_dir, server.clone());
                let credentials = store.load()?;
                let client = Client::start(Arc::new(TlsConnector::new(&credentials)?));
                if credentials.renewal_due(clock::wall())
                    && let Err(error) = renew(&client, &store, &credentials).await
                {
                    // The certificate in use is still good; the next command tries again.
                    tracing::warn!(%error, "this machine's certificate could not be renewed");
                }
                Ok(Self { client, name: name.clone(), directory: None, embedded: None })
            }
        }
    }

    /// Closes everything in good order.
    pub async fn close(self) -> anyhow::Result<()> {
        self.client.close().await;
        match self.embedded {
            Some(embedded) => Ok(embedded.close().await?),
            None => Ok(()),
        }
    }
}

async fn renew(client: &Client, store: &Store, credentials: &Credentials) -> anyhow::Result<()> {
    let certificate = client.renew(credentials.renewal_request()?).await?;
    store.renew(&certificate.into())?;
    Ok(())
}

/// A repository whose key has been opened.
pub struct Opened {
    /// The server.
    pub server: Connected,
    /// The repository.
    pub info: RepositoryInfo,
    /// Its keys.
    pub keyset: Arc<Keyset>,
    /// Id of the key slot that they came from.
    pub slot: [u8; 16],
}

impl Opened {
    /// An existing repository.
    pub async fn existing(global: &Global, place: &Place) -> anyhow::Result<Self> {
        let location = Location::find(global, place)?;
        let server = Connected::open(&location, false, global, place).await?;
        Self::unlock(server, |id| secrets::all(global, place, id)).await
    }

    /// An existing repository, opened by the passphrase that was given and by nothing else.
    pub async fn by_passphrase(global: &Global, place: &Place) -> anyhow::Result<Self> {
        let Some(passphrase) = secrets::passphrase(global, place)? else {
            bail!("no passphrase was given: say with --password-file or --password-command which one is meant");
        };
        let location = Location::find(global, place)?;
        let server = Connected::open(&location, false, global, place).await?;
        Self::unlock(server, |_| Ok(vec![passphrase])).await
    }

    /// A repository to write to: a directory that is none yet becomes one.
    pub async fn writable(global: &Global, place: &Place) -> anyhow::Result<Self> {
        let location = Location::find(global, place)?;
        let fresh = matches!(&location, Location::Directory(directory) if !is_repository(directory));
        if fresh {
            make(&location, global, place).await?;
        }
        let server = Connected::open(&location, false, global, place).await?;
        Self::unlock(server, |id| secrets::all(global, place, id)).await
    }

    async fn unlock(
        server: Connected,
        secrets: impl FnOnce(&RepositoryId) -> anyhow::Result<Vec<SlotSecret>>,
    ) -> anyhow::Result<Self> {
        let unlocking = async {
            let info = server.client.describe(&server.name).await?;
            let unlocked = unlock(&info.slots, &secrets(&info.file.id)?, &info.file)?;
            anyhow::Ok((info, unlocked))
        };
        match unlocking.await {
            Ok((info, Unlocked { keyset, slot })) => Ok(Self { server, info, keyset: Arc::new(keyset), slot }),
            Err(error) => {
                // The first error is the one to report.
                let _ = server.close().await;
                Err(error)
            }
        }
    }
}

#[derive(Serialize)]
struct Created<'a> {
    message_type: &'static str,
    repository: String,
    key_file: Option<PathBuf>,
    recovery_key: &'a str,
}

/// Makes a repository that does not exist yet.
async fn make(location: &Location, global: &Global, place: &Place) -> anyhow::Result<()> {
    let id = RepositoryId(random()?);
    let secret = FirstSecret::choose(&id, global, place)?;
    let server = Connected::open(location, true, global, place).await?;
    let created = create(&server, id, secret, global).await;
    server.close().await?;
    created
}

/// What opens a new repository besides its recovery key.
enum FirstSecret {
    Passphrase(SlotSecret),
    /// The key, where its file belongs, and whether the file is still to be written.
    KeyFile(Zeroizing<[u8; 32]>, PathBuf, bool),
}

impl FirstSecret {
    /// Decides before anything is made: a passphrase if one is given, else the key file that is named (made if it does not
    /// exist), else one in the configuration directory.
    fn choose(id: &RepositoryId, global: &Global, place: &Place) -> anyhow::Result<Self> {
        if let Some(passphrase) = secrets::passphrase(global, place)? {
            return Ok(Self::Passphrase(passphrase));
        }
        let named = global.key_file.as_ref().or(place.settings.key_file.as_ref());
        let path = named.cloned().unwrap_or_else(|| key_file_path(&place.config_dir, id));
        match load_key_file(&path)? {
            Some(key) => Ok(Self::KeyFile(key, path, false)),
            None => Ok(Self::KeyFile(Zeroizing::new(random()?), path, true)),
        }
    }
}

/// Keys first (a repository without a key would be useless), then the repository.
async fn create(server: &Connected, id: RepositoryId, secret: FirstSecret, global: &Global) -> anyhow::Result<()> {
    match server.client.describe(&server.name).await {
        Ok(_) => bail!("the repository `{}` exists already; nothing was changed", server.name),
        Err(ClientError::Ask(AskError::Refused(refusal))) if refusal.code == RefusalCode::NoSuchRepository => {}
        Err(error) => return Err(error.into()),
    }
    let now_ns = clock::wall_ns();
    let keyset = Keyset::create(id)?;
    let file = keyset.public_file(server.name.clone(), default_chunking(), now_ns);
    let recovery = Zeroizing::new(random()?);
    let mut slots = vec![seal_slot(&keyset, &SlotSecret::Recovery(*recovery), "recovery key", now_ns)?.encode()];
    let key_file = match secret {
        FirstSecret::Passphrase(passphrase) => {
            slots.push(seal_slot(&keyset, &passphrase, "passphrase", now_ns)?.encode());
            None
        }
        FirstSecret::KeyFile(key, path, new) => {
            if new {
                store_key_file(&path, &key)?;
            }
            slots.push(seal_slot(&keyset, &SlotSecret::KeyFile(*key), &host_name(), now_ns)?.encode());
            Some(path)
        }
    };
    server.client.create(&file, &slots).await?;
    let recovery = format_recovery_key(&recovery);
    tell_created(global, &id, key_file.as_deref(), &recovery)
}

fn tell_created(global: &Global, id: &RepositoryId, key_file: Option<&Path>, recovery: &str) -> anyhow::Result<()> {
    if global.json {
        return output::json_line(&Created {
            message_type: "repository_created",
            repository: id.to_string(),
            key_file: key_file.map(Path::to_owned),
            recovery_key: recovery,
        });
    }
    let opened_by = match key_file {
        Some(path) => format!("key file      {} (copy it to a safe place)", path.display()),
        None => "opened by     the passphrase".to_owned(),
    };
    let text = Zeroizing::new(format!(
        "created repository {id}\n{opened_by}\nrecovery key  {recovery}\n\
         The recovery key opens the repository if everything else is lost. It is printed only now: write it down.\n\n"
    ));
    output::print(text.as_bytes())
}

/// `strand init`.
pub async fn init(global: &Global, place: &Place) -> anyhow::Result<Fate> {
    let location = Location::find(global, place)?;
    if let Location::Directory(directory) = &location
        && is_repository(directory)
    {
        bail!("{} is a repository already; nothing was changed", directory.display());
    }
    make(&location, global, place).await.map(|()| Fate::Done)
}

/// This machine's name.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_a_directory_or_a_servers_repository() {
        assert!(matches!(Location::parse("/srv/backup").unwrap(), Location::Directory(_)));
        let server = Location::parse("strand://host.example:99/main").unwrap();
        assert!(matches!(server, Location::Server(address, name) if address.port() == 99 && name.as_str() == "main"));
        for bad in ["strand://host", "strand://host/UPPER", "s3://x/y", "", "strand:///x"] {
            assert!(Location::parse(bad).is_err(), "{bad}");
        }
    }
}
