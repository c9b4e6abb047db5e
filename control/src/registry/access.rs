//! How to reach etcd, as the flags say it.

use std::fmt;
use std::path::{Path, PathBuf};

use super::RegistryError;

/// Where etcd is, and who asks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// URLs; without a scheme they are http, or https where a file below is given.
    pub endpoints: Vec<String>,
    /// What the servers' certificates are checked against; else the system's authorities.
    pub ca_file: Option<PathBuf>,
    /// The client's certificate and its key.
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// Name and password.
    pub user: Option<(String, Secret)>,
}

/// A password that stays out of logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// What the files of an [`Access`] hold, in PEM.
#[derive(Debug, Default)]
pub(super) struct Credentials {
    pub(super) authority: Option<String>,
    /// The client's certificate and its key.
    pub(super) client: Option<(String, String)>,
}

impl Access {
    /// The endpoints, each with its scheme.
    pub(super) fn urls(&self) -> impl Iterator<Item = String> + '_ {
        let wants_tls = self.ca_file.is_some() || self.cert_file.is_some();
        self.endpoints.iter().map(move |endpoint| match endpoint.trim() {
            url if url.contains("://") => url.trim_end_matches('/').to_owned(),
            host if wants_tls => format!("https://{host}"),
            host => format!("http://{host}"),
        })
    }

    /// Read for each connection, so that certificates may be renewed.
    pub(super) async fn credentials(&self) -> Result<Credentials, RegistryError> {
        let mut found = Credentials::default();
        if let Some(path) = &self.ca_file {
            found.authority = Some(read("cafile", path).await?);
        }
        if let (Some(cert), Some(key)) = (&self.cert_file, &self.key_file) {
            found.client = Some((read("certfile", cert).await?, read("keyfile", key).await?));
        }
        Ok(found)
    }
}

async fn read(flag: &'static str, path: &Path) -> Result<String, RegistryError> {
    let owned = path.to_owned();
    let text = tokio::task::spawn_blocking(move || std::fs::read_to_string(owned)).await;
    text.map_err(|error| RegistryError::Task(error.to_string()))?
        .map_err(|source| RegistryError::Credentials { flag, path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_without_a_scheme_have_one() {
        let endpoints = vec!["192.0.2.1:2379".into(), " https://etcd:2379/".into()];
        let plain = Access { endpoints, ..Access::default() };
        let urls: Vec<String> = plain.urls().collect();
        assert_eq!(urls, ["http://192.0.2.1:2379", "https://etcd:2379"]);
        let tls = Access { ca_file: Some("/ca".into()), ..plain };
        assert_eq!(tls.urls().next().as_deref(), Some("https://192.0.2.1:2379"));
    }

    #[test]
    fn a_secret_is_not_printed() {
        let user = Some(("root".into(), Secret("hunter2".into())));
        assert!(!format!("{:?}", Access { user, ..Access::default() }).contains("hunter2"));
    }
}
