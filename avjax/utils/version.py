"""The version of avjax, for records that outlive the installation."""

VERSION = "0.1.0"
