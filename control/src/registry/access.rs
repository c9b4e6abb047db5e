//! How to reach etcd, as the flags say it.

use std::fmt;
use std::path::{Path, PathBuf};

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

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
    pub user: Option<(String, Password)>,
}

/// A user's password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Password {
    Given(Secret),
    /// In this file, but for a line's end. Read for each connection, so that it may be changed.
    File(PathBuf),
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

    /// Name and password, for one connection.
    pub(super) async fn login(&self) -> Result<Option<(String, Secret)>, RegistryError> {
        let Some((name, password)) = &self.user else { return Ok(None) };
        let secret = match password {
            Password::Given(secret) => secret.clone(),
            Password::File(path) => {
                let text = read("password-file", path).await?;
                Secret(text.trim_end_matches(['\r', '\n']).to_owned())
            }
        };
        Ok(Some((name.clone(), secret)))
    }

    /// Read for each connection, so that certificates may be renewed.
    pub(super) async fn credentials(&self) -> Result<Credentials, RegistryError> {
        let mut found = Credentials::default();
        if let Some(path) = &self.ca_file {
            found.authority = Some(read("cafile", path).await?);
        }
        if let (Some(cert), Some(key)) = (&self.cert_file, &self.key_file) {
            let pair = (read("certfile", cert).await?, read("keyfile", key).await?);
            // ureq takes for granted that they are.
            check_pair(&pair.0, &pair.1).map_err(|reason| {
                let (cert, key) = (cert.clone(), key.clone());
                RegistryError::ClientCertificate { cert, key, reason }
            })?;
            found.client = Some(pair);
        }
        Ok(found)
    }
}

/// Whether a certificate is that of a key, and both are such as TLS can use.
fn check_pair(cert: &str, key: &str) -> Result<(), String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(cert.as_bytes()).collect();
    let chain = chain.map_err(|error| format!("the certificate: {error}"))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes());
    let key = key.map_err(|error| format!("the key: {error}"))?;
    let pair = CertifiedKey::from_der(chain, key, &ring::default_provider());
    pair.map(drop).map_err(|error| error.to_string())
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
        let user = Some(("root".into(), Password::Given(Secret("hunter2".into()))));
        assert!(!format!("{:?}", Access { user, ..Access::default() }).contains("hunter2"));
    }
}
