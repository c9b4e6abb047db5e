//! The flags that lead to a registry, from what the daemon's own came to: for commands that somebody is
//! to type.

use std::path::PathBuf;

use clap::ValueEnum;
use weft_control::Access;

use super::EtcdApi;
use super::settings::{ETCD_ENDPOINTS, ETCD_PREFIX, RegistrySettings};

impl RegistrySettings {
    /// weft's flags that lead there, but for the defaults and the password: what somebody may type.
    pub(crate) fn weft_flags(&self) -> String {
        let (access, prefix, api) = match self {
            Self::Directory(path) => {
                return format!(" --registry {}", quoted(&format!("dir:{}", path.display())));
            }
            Self::Etcd { access, prefix, api } => (access, prefix, api),
        };
        let mut flags = String::new();
        let mut add = |flag: &str, value: &str| {
            flags.extend([" --etcd-", flag, " ", &quoted(value)]);
        };
        if access.endpoints != ETCD_ENDPOINTS {
            add("endpoints", &access.endpoints.join(","));
        }
        if prefix != ETCD_PREFIX {
            add("prefix", prefix);
        }
        if let Some(value) = api.to_possible_value().filter(|_| *api != EtcdApi::Auto) {
            add("api", value.get_name());
        }
        for (flag, file) in ["cafile", "certfile", "keyfile"].into_iter().zip(files(access)) {
            file.iter().for_each(|file| add(flag, &file.display().to_string()));
        }
        if let Some((name, _)) = &access.user {
            add("username", name);
            add("password-file", "FILE");
        }
        flags
    }

    /// The same for etcdctl, but for the endpoints.
    pub(crate) fn etcdctl_flags(&self) -> String {
        let Self::Etcd { access, .. } = self else { return String::new() };
        let mut flags = String::new();
        for (flag, file) in ["cacert", "cert", "key"].into_iter().zip(files(access)) {
            let told =
                |file: &PathBuf| format!(" --{flag} {}", quoted(&file.display().to_string()));
            flags.extend(file.as_ref().map(told));
        }
        flags.extend(access.user.iter().map(|(name, _)| format!(" --user {}", quoted(name))));
        flags
    }
}

/// As one word for a shell.
pub(crate) fn quoted(value: &str) -> String {
    let is_plain = |it: char| it.is_ascii_alphanumeric() || "_./:,@-".contains(it);
    if value.chars().all(is_plain) {
        value.into()
    } else {
        format!("'{}'", value.replace('\'', r"'\''"))
    }
}

/// The authority, the certificate and its key.
fn files(access: &Access) -> [&Option<PathBuf>; 3] {
    [&access.ca_file, &access.cert_file, &access.key_file]
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::fs;

    use super::super::parse;
    use super::*;

    fn registry(flags: &[&str]) -> RegistrySettings {
        let args = ["weftd"].iter().chain(flags).map(OsString::from);
        parse(args, |_| None).unwrap().settings().unwrap().registry
    }

    /// An operator who types what doctor says must not change another registry.
    #[test]
    fn the_flags_of_a_registry_lead_to_it_again() {
        let password = tempfile::NamedTempFile::new().unwrap();
        fs::write(password.path(), "hunter2").unwrap();
        let password = password.path().display().to_string();
        let etcd = [
            "--etcd-endpoints=https://a:2379,https://b:2379",
            "--etcd-prefix=/x",
            "--etcd-api=v2",
            "--etcd-cafile=/ca",
            "--etcd-certfile=/c",
            "--etcd-keyfile=/k",
            "--etcd-username=me",
            &format!("--etcd-password-file={password}"),
        ];
        for given in [&[][..], &["--registry=dir:/srv/registry"], &["--etcd-prefix=/x"], &etcd] {
            let wanted = registry(given);
            let told = wanted.weft_flags().replace("FILE", &password);
            let told: Vec<&str> = told.split_whitespace().collect();
            assert_eq!(registry(&told), wanted, "{told:?}");
        }
        assert_eq!(registry(&[]).weft_flags(), "");
        let odd = registry(&["--registry=dir:/srv/it's here"]);
        assert_eq!(odd.weft_flags(), r" --registry 'dir:/srv/it'\''s here'");
        assert_eq!(registry(&etcd).etcdctl_flags(), " --cacert /ca --cert /c --key /k --user me");
    }
}
