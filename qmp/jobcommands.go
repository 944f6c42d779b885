package qmp

import "context"

// jobStatusChange is the name of the event for every change of a job's state.
const jobStatusChange = "JOB_STATUS_CHANGE"

type jobStatusData struct {
	ID     string    `qmp:"id"`
	Status JobStatus `qmp:"status"`
}

type jobArguments struct {
	ID string `qmp:"id"`
}

// emitJobStatus is called with the jobs' lock held; Emit neither waits nor looks at jobs.
func (s *Server) emitJobStatus(id string, status JobStatus) {
	// The event is registered by NewRegistry with this very type, so that Emit cannot fail.
	_ = s.Emit(jobStatusChange, jobStatusData{id, status})
}

// registerJobs adds the commands and the event of QEMU's qapi/job.json.
func registerJobs(r *Registry) {
	RegisterEvent[jobStatusData](r, jobStatusChange)
	Register(r, "query-jobs", func(_ context.Context, s *Session, _ Empty) ([]JobInfo, error) {
		return s.srv.jobs.Query(), nil
	})
	for name, verb := range map[string]func(*Job) error{
		"job-pause":    (*Job).Pause,
		"job-resume":   (*Job).Resume,
		"job-cancel":   func(j *Job) error { return j.Cancel(true) },
		"job-complete": (*Job).Complete,
		"job-finalize": (*Job).Finalize,
		"job-dismiss":  (*Job).Dismiss,
	} {
		Register(r, name, func(_ context.Context, s *Session, a jobArguments) (Empty, error) {
			j, err := s.srv.jobs.Find(a.ID)
			if err != nil {
				return Empty{}, err
			}
			return Empty{}, verb(j)
		})
	}
}
