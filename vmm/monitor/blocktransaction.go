package monitor

import (
	"context"

	"github.com/gnomon-vmm/gnomon/disk/block"
	"github.com/gnomon-vmm/gnomon/qmp"
)

// actionKind is TransactionActionKind, completionMode ActionCompletionMode of QEMU's
// qapi/transaction.json.
type (
	actionKind     string
	completionMode string
)

func (actionKind) Values() []string {
	return []string{
		"abort", "block-dirty-bitmap-add", "block-dirty-bitmap-remove", "block-dirty-bitmap-clear", "block-dirty-bitmap-enable", "block-dirty-bitmap-disable",
		"block-dirty-bitmap-merge", "blockdev-backup", "blockdev-snapshot", "blockdev-snapshot-sync", "drive-backup",
	}
}

// Values are those that jobs of a transaction have: each ends for itself.
func (completionMode) Values() []string { return []string{"individual"} }

// maxActions bounds a transaction.
const maxActions = 256

type (
	transactionArguments struct {
		Actions    []transactionAction    `qmp:"actions"`
		Properties *transactionProperties `qmp:"properties"`
	}
	transactionProperties struct {
		CompletionMode *completionMode `qmp:"completion-mode"`
	}
	transactionAction struct {
		Type           actionKind              `qmp:"type,tag"`
		Abort          *actionOf[qmp.Empty]    `qmp:"abort,variant"`
		BitmapAdd      *bitmapAddAction        `qmp:"block-dirty-bitmap-add,variant"`
		BitmapRemove   *bitmapAction           `qmp:"block-dirty-bitmap-remove,variant"`
		BitmapClear    *bitmapAction           `qmp:"block-dirty-bitmap-clear,variant"`
		BitmapEnable   *bitmapAction           `qmp:"block-dirty-bitmap-enable,variant"`
		BitmapDisable  *bitmapAction           `qmp:"block-dirty-bitmap-disable,variant"`
		BitmapMerge    *bitmapMergeAction      `qmp:"block-dirty-bitmap-merge,variant"`
		BlockdevBackup *blockdevBackupAction   `qmp:"blockdev-backup,variant"`
		Snapshot       *blockdevSnapshotAction `qmp:"blockdev-snapshot,variant"`
		SnapshotSync   *blockdevSnapshotSync   `qmp:"blockdev-snapshot-sync,variant"`
		DriveBackup    *driveBackupAction      `qmp:"drive-backup,variant"`
	}
	actionOf[A any] struct {
		Data A `qmp:"data"`
	}
	bitmapAddAction        = actionOf[bitmapAddArguments]
	bitmapAction           = actionOf[bitmapArguments]
	bitmapMergeAction      = actionOf[bitmapMergeArguments]
	blockdevBackupAction   = actionOf[blockdevBackupArguments]
	blockdevSnapshotAction = actionOf[overlayArguments]
	blockdevSnapshotSync   = actionOf[snapshotSyncArguments]
	driveBackupAction      = actionOf[driveBackupArguments]
)

func (mon *monitor) registerTransaction(reg *qmp.Registry) {
	qmp.Register(reg, "transaction", mon.transaction)
}

// transaction does several things at one instant of all disks concerned, or none.
func (mon *monitor) transaction(_ context.Context, s *qmp.Session, a transactionArguments) (e qmp.Empty, err error) {
	if len(a.Actions) > maxActions {
		return e, qmp.Errorf("a transaction has at most %d actions", maxActions)
	}
	var changes []*change
	names := map[string]bool{}
	for i := range a.Actions {
		action := &a.Actions[i]
		if n := action.SnapshotSync; n != nil && n.Data.SnapshotNodeName != nil {
			if names[*n.Data.SnapshotNodeName] {
				return e, qmp.Errorf("Duplicate nodes with node-name='%s'", *n.Data.SnapshotNodeName)
			}
			names[*n.Data.SnapshotNodeName] = true
		}
		c, err := mon.actionChange(s, action)
		if err != nil {
			return e, err
		}
		changes = append(changes, c)
	}
	return e, mon.transact(changes...)
}

func (mon *monitor) actionChange(s *qmp.Session, a *transactionAction) (*change, error) {
	switch {
	case a.BitmapAdd != nil:
		return mon.addBitmap(s, a.BitmapAdd.Data)
	case a.BitmapRemove != nil:
		return mon.removeBitmap(s, a.BitmapRemove.Data)
	case a.BitmapClear != nil:
		return mon.clearBitmap(s, a.BitmapClear.Data)
	case a.BitmapEnable != nil:
		return mon.enableBitmap(s, a.BitmapEnable.Data)
	case a.BitmapDisable != nil:
		return mon.disableBitmap(s, a.BitmapDisable.Data)
	case a.BitmapMerge != nil:
		return mon.mergeBitmaps(s, a.BitmapMerge.Data)
	case a.BlockdevBackup != nil:
		return mon.blockdevBackup(s, a.BlockdevBackup.Data)
	case a.Snapshot != nil:
		return mon.snapshotOn(s, a.Snapshot.Data)
	case a.SnapshotSync != nil:
		return mon.snapshotSync(s, a.SnapshotSync.Data)
	case a.DriveBackup != nil:
		return mon.driveBackup(s, a.DriveBackup.Data)
	}
	return &change{apply: func(block.Node) (block.Node, error) {
		return nil, qmp.Errorf("Transaction aborted using Abort action")
	}}, nil
}
