//! From the command line to an open repository: where it is, who serves it, which key opens it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
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
use super::settings::Place;
use crate::chunk::default_chunking;
use crate::embedded::{Embedded, LOCAL_REPOSITORY, is_repository};
use crate::identity::{Credentials, Store};
use crate::keys::{
    Keyset, SlotSecret, format_recovery_key, key_file_path, load_key_file, parse_recovery_key, random, seal_slot,
    store_key_file, unlock,
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
}

impl Opened {
    /// An existing repository.
    pub async fn existing(global: &Global, place: &Place) -> anyhow::Result<Self> {
        let location = Location::find(global, place)?;
        let server = Connected::open(&location, false, global, place).await?;
        Self::unlock(server, global, place).await
    }

    /// A repository to write to: a directory that is none yet becomes one.
    pub async fn writable(global: &Global, place: &Place) -> anyhow::Result<Self> {
        let location = Location::find(global, place)?;
        let fresh = matches!(&location, Location::Directory(directory) if !is_repository(directory));
        if fresh {
            make(&location, global, place).await?;
        }
        let server = Connected::open(&location, false, global, place).await?;
        Self::unlock(server, global, place).await
    }

    async fn unlock(server: Connected, global: &Global, place: &Place) -> anyhow::Result<Self> {
        let unlocking = async {
            let info = server.client.describe(&server.name).await?;
            let secrets = secrets(global, place, &info.file.id)?;
            if secrets.is_empty() {
                bail!(crate::keys::KeyError::WrongKey {
                    tried: format!(
                        "there is no key file {} and neither a passphrase nor a recovery key was given",
                        key_file_path(&place.config_dir, &info.file.id).display()
                    )
                });
            }
            let keyset = unlock(&info.slots, &secrets, &info.file)?;
            Ok((info, keyset))
        };
        match unlocking.await {
            Ok((info, keyset)) => Ok(Self { server, info, keyset: Arc::new(keyset) }),
            Err(error) => {
                // The first error is the one to report.
                let _ = server.close().await;
                Err(error)
            }
        }
    }
}

/// Everything that may open the repository, what was asked for first.
fn secrets(global: &Global, place: &Place, repository: &RepositoryId) -> anyhow::Result<Vec<SlotSecret>> {
    let mut secrets = Vec::new();
    if let Some(path) = global.key_file.as_ref().or(place.settings.key_file.as_ref()) {
        let key = load_key_file(path)?.ok_or_else(|| anyhow!("there is no key file {}", path.display()))?;
        secrets.push(SlotSecret::KeyFile(*key));
    }
    if let Some(path) = &global.recovery_key_file {
        let text = first_line(File::open(path).with_context(|| format!("cannot read {}", path.display()))?)?;
        secrets.push(SlotSecret::Recovery(*parse_recovery_key(&text)?));
    }
    if let Some(passphrase) = passphrase(global, place)? {
        secrets.push(SlotSecret::Passphrase(passphrase));
    }
    // Whoever names a key wants to know whether that one opens the repository.
    if secrets.is_empty()
        && let Some(key) = load_key_file(&key_file_path(&place.config_dir, repository))?
    {
        secrets.push(SlotSecret::KeyFile(*key));
    }
    Ok(secrets)
}

fn passphrase(global: &Global, place: &Place) -> anyhow::Result<Option<String>> {
    if let Some(path) = global.password_file.as_ref().or(place.settings.password_file.as_ref()) {
        let file = File::open(path).with_context(|| format!("cannot read the password file {}", path.display()))?;
        return Ok(Some(first_line(file)?));
    }
    if let Some(command) = global.password_command.as_ref().or(place.settings.password_command.as_ref()) {
        let output = Command::new("/bin/sh").arg("-c").arg(command).stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("the password command failed ({}); nothing was changed", output.status);
        }
        return Ok(Some(first_line(output.stdout.as_slice())?));
    }
    Ok(std::env::var("STRAND_PASSWORD").ok().filter(|text| !text.is_empty()))
}

fn first_line(reader: impl std::io::Read) -> anyhow::Result<String> {
    let mut line = String::new();
    BufReader::new(reader.take(64 << 10)).read_line(&mut line)?;
    let line = line.trim_end_matches(['\n', '\r']);
    if line.is_empty() { Err(anyhow!("the passphrase or key is empty")) } else { Ok(line.to_owned()) }
}

#[derive(Serialize)]
struct Created {
    message_type: &'static str,
    repository: String,
    key_file: Option<PathBuf>,
    recovery_key: String,
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
    Passphrase(String),
    /// The key, where its file belongs, and whether the file is still to be written.
    KeyFile(Zeroizing<[u8; 32]>, PathBuf, bool),
}

impl FirstSecret {
    /// Decides before anything is made: a passphrase if one is given, else the key file that is named (made if it does not
    /// exist), else one in the configuration directory.
    fn choose(id: &RepositoryId, global: &Global, place: &Place) -> anyhow::Result<Self> {
        if let Some(passphrase) = passphrase(global, place)? {
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
    let recovery: [u8; 32] = random()?;
    let mut slots = vec![seal_slot(&keyset, &SlotSecret::Recovery(recovery), "recovery key", now_ns)?.encode()];
    let key_file = match secret {
        FirstSecret::Passphrase(passphrase) => {
            slots.push(seal_slot(&keyset, &SlotSecret::Passphrase(passphrase), "passphrase", now_ns)?.encode());
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
            recovery_key: recovery.to_owned(),
        });
    }
    let opened_by = match key_file {
        Some(path) => format!("key file      {} (copy it to a safe place)", path.display()),
        None => "opened by     the passphrase".to_owned(),
    };
    output::print(
        format!(
            "created repository {id}\n{opened_by}\nrecovery key  {recovery}\n\
             The recovery key opens the repository if everything else is lost. It is printed only now: write it down.\n\n"
        )
        .as_bytes(),
    )
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
