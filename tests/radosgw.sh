#!/bin/bash
# Runs a command with Ceph's radosgw on 127.0.0.1, from Debian's packages, unpacked and not installed:
#     tests/radosgw.sh FOLDER COMMAND...
# A monitor, one OSD that keeps its data in memory, and radosgw; FOLDER keeps the packages (about 300 MB) for the next time.
# The command finds the server in RADOSGW_ENDPOINT, RADOSGW_KEY and RADOSGW_SECRET. Needs amd64 Debian 12, apt-get and dpkg.
set -euo pipefail
mkdir -p "$1"; cd "$1"; home=$PWD; cd - >/dev/null; shift
root=$home/root data=$home/data lib=$home/root/usr/lib/x86_64-linux-gnu
libraries=$lib:$lib/ceph:$root/lib/x86_64-linux-gnu
packages="radosgw librgw2 ceph-mon ceph-osd ceph-base ceph-common librados2 librbd1 libradosstriper1 libcephfs2
python3-ceph-argparse python3-ceph-common python3-rados python3-rbd python3-cephfs python3-rgw python3-prettytable
python3-wcwidth libaio1 libboost-context1.74.0 libboost-thread1.74.0 libboost-filesystem1.74.0 libboost-iostreams1.74.0
libboost-program-options1.74.0 libboost-regex1.74.0 libfmt9 libfuse2 libgoogle-perftools4 libtcmalloc-minimal4 libibverbs1
libleveldb1d liblua5.3-0 libpmem1 libndctl6 libdaxctl1 libnl-3-200 libnl-route-3-200 liboath0 librabbitmq4 librdmacm1
libsnappy1v5"
if [ ! -e "$home/unpacked" ]; then
    mkdir -p "$home/debs" "$root"
    (cd "$home/debs" && apt-get download -qq $packages)
    for package in "$home"/debs/*.deb; do dpkg -x "$package" "$root"; done
    touch "$home/unpacked"
fi
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
mon_port=$(free_port) rgw_port=$(free_port) fsid=$(cat /proc/sys/kernel/random/uuid) osd=$(cat /proc/sys/kernel/random/uuid)
rm -rf "$data"; mkdir -p "$data"/{mon/a,osd/0,run,log,rgw}
cat > "$data/ceph.conf" <<C
[global]
fsid = $fsid
mon_host = v1:127.0.0.1:$mon_port
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr2 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
mon_max_pg_per_osd = 1000
mon_allow_pool_size_one = true
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
memstore_device_bytes = 4294967296
run_dir = $data/run
admin_socket = $data/run/\$name.asok
pid_file = $data/run/\$name.pid
log_file = $data/log/\$name.log
plugin_dir = $lib/ceph
erasure_code_dir = $lib/ceph/erasure-code
osd_class_dir = $lib/rados-classes
rgw_frontends = beast endpoint=127.0.0.1:$rgw_port tcp_nodelay=1
rgw_gc_obj_min_wait = 1
rgw_gc_processor_period = 2
rgw_data = $data/rgw
mon_data = $data/mon/a
osd_data = $data/osd/0
C
ceph() { LD_LIBRARY_PATH=$libraries PATH=$root/usr/bin:$PATH PYTHONPATH=$root/usr/lib/python3/dist-packages "$@"; }
until_ok() { for _ in $(seq 60); do "$@" >/dev/null 2>&1 && return; sleep 0.5; done; echo "no answer: $*; see $data/log" >&2; return 1; }
started=()
trap 'kill -9 "${started[@]}" 2>/dev/null || true' EXIT
start() { LD_LIBRARY_PATH=$libraries "$root/usr/bin/$1" -c "$data/ceph.conf" "${@:2}" -f >"$data/log/$1.out" 2>&1 & started+=($!); }
osd_is_up() { ceph timeout 10 /usr/bin/python3 "$root/usr/bin/ceph" -c "$data/ceph.conf" osd stat | grep -q "1 up"; }
answers() { (: </dev/tcp/127.0.0.1/"$rgw_port"); }

ceph monmaptool --create --addv a "v1:127.0.0.1:$mon_port" --fsid "$fsid" "$data/monmap" >/dev/null
ceph ceph-mon -c "$data/ceph.conf" --mkfs -i a --monmap "$data/monmap"
start ceph-mon -i a
until_ok ceph timeout 10 rados -c "$data/ceph.conf" lspools
ceph timeout 20 /usr/bin/python3 "$root/usr/bin/ceph" -c "$data/ceph.conf" osd new "$osd" >/dev/null
ceph ceph-osd -c "$data/ceph.conf" -i 0 --mkfs --osd-uuid "$osd" >"$data/log/mkfs.out" 2>&1
start ceph-osd -i 0
until_ok osd_is_up
export RADOSGW_KEY=AKIATESTKEY00001 RADOSGW_SECRET=secret-of-the-tests-0001 RADOSGW_ENDPOINT=http://127.0.0.1:$rgw_port
ceph timeout 60 radosgw-admin -c "$data/ceph.conf" user create --uid=t --display-name=t \
    --access-key="$RADOSGW_KEY" --secret="$RADOSGW_SECRET" >"$data/log/user.out" 2>&1
start radosgw -n client.admin
until_ok answers
"$@"
